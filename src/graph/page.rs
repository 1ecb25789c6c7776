//! One answer of a list, taken apart straight from its bytes.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The objects of an answer and where the list goes on.
#[derive(Debug)]
pub(super) struct Parsed {
    /// Each object, with its id if it has one.
    pub(super) objects: Vec<(ObjectText, Option<String>)>,
    /// The next link, exactly as it was given.
    pub(super) next: Option<String>,
}

/// The JSON text of an object, where it stands in the answer: it is not copied.
pub struct ObjectText {
    answer: Arc<String>,
    range: Range<usize>,
}

impl ObjectText {
    /// `part` is a part of `answer`.
    fn of(answer: &Arc<String>, part: &str) -> Self {
        let begin = part.as_ptr().addr() - answer.as_ptr().addr();
        Self { answer: Arc::clone(answer), range: begin..begin + part.len() }
    }

    /// The text, as Graph wrote it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.answer[self.range.clone()]
    }
}

/// Without what it says: an object may hold more than may be kept.
impl fmt::Debug for ObjectText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes of JSON", self.range.len())
    }
}

/// Why an answer can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It ends too early: it was cut on its way, and the next try may bring all of it.
    Cut,
    /// It is something else.
    NotAPage,
}

impl From<serde_json::Error> for Unreadable {
    fn from(error: serde_json::Error) -> Self {
        if error.is_eof() { Self::Cut } else { Self::NotAPage }
    }
}

/// `@odata.count` is not read: it is no total.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    value: Option<Vec<&'a RawValue>>,
    #[serde(rename = "@odata.nextLink")]
    next: Option<String>,
}

/// Reads one page of a collection whose objects have their id in `id_property`.
pub(super) fn collection(body: Vec<u8>, id_property: &str) -> Result<Parsed, Unreadable> {
    let answer = text(body)?;
    let envelope: Envelope<'_> = serde_json::from_str(&answer)?;
    let objects = envelope.value.ok_or(Unreadable::NotAPage)?.into_iter().map(RawValue::get);
    let objects = objects.map(|object| (ObjectText::of(&answer, object), id_of(object, id_property))).collect();
    Ok(Parsed { objects, next: envelope.next })
}

/// Reads the answer of a singleton: one object, which need not have an id.
pub(super) fn singleton(body: Vec<u8>, id_property: &str) -> Result<Parsed, Unreadable> {
    let answer = text(body)?;
    let object = serde_json::from_str::<&RawValue>(&answer)?.get();
    if !object.starts_with('{') {
        return Err(Unreadable::NotAPage);
    }
    let objects = vec![(ObjectText::of(&answer, object), id_of(object, id_property))];
    Ok(Parsed { objects, next: None })
}

fn text(body: Vec<u8>) -> Result<Arc<String>, Unreadable> {
    String::from_utf8(body).map(Arc::new).map_err(|error| match error.utf8_error().error_len() {
        None => Unreadable::Cut,
        Some(_) => Unreadable::NotAPage,
    })
}

/// The id of an object, read no further than up to it.
fn id_of(object: &str, property: &str) -> Option<String> {
    let mut found = None;
    let mut reader = serde_json::Deserializer::from_str(object);
    // The search stops at the id, which the reader takes for an error; what was found counts.
    let _ = FindId { property, found: &mut found }.deserialize(&mut reader);
    found
}

struct FindId<'a> {
    property: &'a str,
    found: &'a mut Option<String>,
}

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for FindId<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FindId<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            if key != self.property {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let raw: &RawValue = map.next_value()?;
            *self.found = match raw.get().as_bytes().first() {
                Some(b'"') => serde_json::from_str(raw.get()).ok(),
                Some(b'-' | b'0'..=b'9') => Some(raw.get().to_owned()),
                _ => None,
            };
            break;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::catalog::Catalog;
    use crate::domain::item::RawObject;

    fn ids(body: &str) -> Vec<Option<String>> {
        collection(body.into(), "id").unwrap().objects.into_iter().map(|(_, id)| id).collect()
    }

    #[test]
    fn objects_keep_their_bytes_and_ids_are_found_wherever_they_stand() {
        let body = r#"{"@odata.count":0,"value":[{"a":{"id":"no"},"id":"1", "x":1.50},{"id":7},{"id":null},{"b":1}]}"#;
        assert_eq!(ids(body), [Some("1".to_owned()), Some("7".to_owned()), None, None]);
        let parsed = collection(body.into(), "id").unwrap();
        assert_eq!(parsed.objects[0].0.as_str(), r#"{"a":{"id":"no"},"id":"1", "x":1.50}"#);
        assert_eq!(parsed.next, None);
    }

    #[test]
    fn escaped_ids_and_other_id_properties_are_read() {
        assert_eq!(ids(r#"{"value":[{"id":"aäb\"c"}]}"#), [Some("aäb\"c".to_owned())]);
        let parsed = collection(br#"{"value":[{"id":"1","version":"2"}]}"#.into(), "version").unwrap();
        assert_eq!(parsed.objects[0].1.as_deref(), Some("2"));
    }

    #[test]
    fn the_next_link_is_taken_as_it_stands() {
        let link = "https://h/beta/x?$skiptoken=%255Bcosmosdb%255D";
        let body = format!(r#"{{"@odata.nextLink":"{link}","value":[]}}"#);
        assert_eq!(collection(body.into(), "id").unwrap().next.as_deref(), Some(link));
    }

    #[test]
    fn what_was_cut_is_told_from_what_is_no_page() {
        let whole = r#"{"value":[{"id":"1"},{"id":"2"}]}"#;
        for end in 0..whole.len() {
            assert_eq!(collection(whole[..end].into(), "id").unwrap_err(), Unreadable::Cut, "{end}");
        }
        for body in ["<html>", "[]", "7", r#"{"value":7}"#, r#"{"value":{}}"#, r#"{"values":[]}"#, r#"{"value":null}"#]
        {
            assert_eq!(collection(body.into(), "id").unwrap_err(), Unreadable::NotAPage, "{body}");
        }
    }

    #[test]
    fn a_singleton_is_one_object_with_or_without_an_id() {
        assert_eq!(singleton(br#"{"id":"1"}"#.into(), "id").unwrap().objects[0].1.as_deref(), Some("1"));
        assert_eq!(singleton(br#"{"a":1}"#.into(), "id").unwrap().objects[0].1, None);
        assert_eq!(singleton(b"[]".into(), "id").unwrap_err(), Unreadable::NotAPage);
        assert_eq!(singleton(Vec::new(), "id").unwrap_err(), Unreadable::Cut);
    }
    static CATALOG: LazyLock<Catalog> = LazyLock::new(Catalog::built_in);
    const PAGE: &str = r##"{"@odata.context":"c","@odata.count":2,"@odata.nextLink":"https://h/beta/x?$skip=2","value":[
        {"@odata.type":"#microsoft.graph.win32LobApp","id":"a\u00e4","displayName":"One","roleScopeTagIds":["0"],"size":1.5e3},
        {"id":7,"displayName":null,"nested":{"id":"no","list":[1,[2,{"x":null}]]}}]}"##;

    proptest! {
        #[test]
        fn a_damaged_page_gives_objects_that_can_be_stored_or_is_none(
            damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(b'"'), Just(b'{'), Just(b']')]), 0..6),
            end in any::<prop::sample::Index>(), cut in any::<bool>(),
        ) {
            let mut body = PAGE.as_bytes().to_vec();
            for (at, byte) in damage {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if cut {
                body.truncate(end.index(body.len()));
            }
            let _ = singleton(body.clone(), "id");
            let Ok(parsed) = collection(body.clone(), "id") else { return Ok(()) };
            let app = CATALOG.types().find(|one| one.key == "mobileApp").unwrap();
            for (text, _) in &parsed.objects {
                let text = text.as_str();
                prop_assert!(body.windows(text.len()).any(|bytes| bytes == text.as_bytes()));
                let Ok(object) = RawObject::parse(text) else { continue };
                if let Ok(item) = object.observe(app) {
                    prop_assert!(!item.external_id.is_empty());
                }
            }
        }
    }
}
