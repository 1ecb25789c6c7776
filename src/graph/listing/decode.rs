//! Decoder of one response of a list, straight from its bytes.
//!
//! Duplicate keys: the first one counts for the properties of an object, the last one within their values, as in PostgreSQL;
//! two `value` arrays are a decode error.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::body_text::{BodyText, DecodeError, range_in};
use super::error_body;

/// Objects of a response and the link to the next page.
#[derive(Debug, Default)]
pub(in crate::graph) struct DecodedPage {
    /// Each object, with its id if it has one.
    pub(in crate::graph) objects: Vec<(ObjectText, Option<Box<str>>)>,
    /// Elements that are not objects, or are damaged: counted, not kept.
    pub(in crate::graph) bad_objects: usize,
    /// Next link, exactly as received.
    pub(in crate::graph) next: Option<String>,
}

/// JSON text of an object, as a slice of its response. Positions take four bytes each, because a page can have millions
/// of objects of a few bytes; `graph.max_page_bytes` bounds them.
pub struct ObjectText {
    response: Arc<String>,
    start: u32,
    end: u32,
}

impl ObjectText {
    /// Text of `part`, which is a slice of `response`.
    fn of(response: &Arc<String>, part: &str) -> Self {
        let (range, position) = (range_in(response, part), |at| u32::try_from(at).unwrap_or(u32::MAX));
        Self { response: Arc::clone(response), start: position(range.start), end: position(range.end) }
    }

    /// Text as Graph sent it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.response.get(self.start as usize..self.end as usize).unwrap_or_default()
    }
}

/// Shows the length only: an object may contain more than may be kept.
impl fmt::Debug for ObjectText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes of JSON", self.end - self.start)
    }
}

/// Envelope of a page. `@odata.count` is ignored: it is not a total.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    value: Option<Elements<'a>>,
    #[serde(rename = "@odata.nextLink", alias = "@nextLink", alias = "odata.nextLink")]
    next: Option<String>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// Objects of `value`; anything else is counted only, so that memory stays in proportion to the text.
struct Elements<'a> {
    objects: Vec<&'a RawValue>,
    others: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for Elements<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(CollectElements)
    }
}

struct CollectElements;

impl<'de> Visitor<'de> for CollectElements {
    type Value = Elements<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Elements { objects: Vec::new(), others: 0 };
        while let Some(element) = seq.next_element::<&'de RawValue>()? {
            if element.get().starts_with('{') && element.get() != "{}" {
                elements.objects.push(element);
            } else {
                elements.others += 1;
            }
        }
        Ok(elements)
    }
}

/// Decodes one page of a collection whose objects have their id in `id_property`.
pub(in crate::graph) fn collection(body: Vec<u8>, id_property: &str) -> Result<DecodedPage, DecodeError> {
    BodyText::new(body)?.decode(|text| collection_in(text, id_property))
}

fn collection_in(text: &BodyText, id_property: &str) -> Result<DecodedPage, DecodeError> {
    let envelope: Envelope<'_> = text.parse()?;
    // An error beside the objects means that Graph failed after it had begun to respond.
    if envelope.error.is_some_and(|error| error.get() != "null") {
        return Err(DecodeError::Embedded(error_body::embedded_code(&text.text)));
    }
    let Elements { objects: raw, others } = envelope.value.ok_or(DecodeError::Malformed)?;
    let (mut objects, mut bad_objects) = (Vec::with_capacity(raw.len()), others);
    for object in raw.into_iter().map(RawValue::get) {
        let id = id_of(object, id_property);
        if id.is_none() && is_error(object) {
            return Err(DecodeError::Embedded(error_body::embedded_code(object)));
        }
        if text.is_damaged(object) {
            bad_objects += 1;
        } else {
            objects.push((ObjectText::of(&text.text, object), id));
        }
    }
    Ok(DecodedPage { objects, bad_objects, next: envelope.next.filter(|link| !link.trim().is_empty()) })
}

/// Decodes a singleton: one object, which need not have an id.
pub(in crate::graph) fn singleton(body: Vec<u8>, id_property: &str) -> Result<DecodedPage, DecodeError> {
    BodyText::new(body)?.decode(|text| {
        let object = text.parse::<&RawValue>()?.get();
        let id = id_of(object, id_property);
        if id.is_none() && is_error(object) {
            return Err(DecodeError::Embedded(error_body::embedded_code(object)));
        }
        if !object.starts_with('{') || text.is_damaged(object) {
            return Err(DecodeError::Malformed);
        }
        Ok(DecodedPage { objects: vec![(ObjectText::of(&text.text, object), id)], bad_objects: 0, next: None })
    })
}

/// Object without an id that is an OData error.
fn is_error(object: &str) -> bool {
    #[derive(Deserialize)]
    struct Error<'a> {
        #[serde(borrow)]
        error: Option<&'a RawValue>,
    }
    serde_json::from_str::<Error<'_>>(object).is_ok_and(|object| object.error.is_some())
}

/// Id of an object. Graph sends it first, and nothing after it is read.
fn id_of(object: &str, property: &str) -> Option<Box<str>> {
    let mut found = None;
    let mut reader = serde_json::Deserializer::from_str(object);
    // The error is that the object was not read to its end.
    let _ = FindId { property, found: &mut found }.deserialize(&mut reader);
    found
}

struct FindId<'a> {
    property: &'a str,
    found: &'a mut Option<Box<str>>,
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
                Some(b'-' | b'0'..=b'9') => Some(raw.get().into()),
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
        collection(body.into(), "id").unwrap().objects.into_iter().map(|(_, id)| id.map(String::from)).collect()
    }

    #[test]
    fn objects_keep_their_bytes_and_ids_are_found_at_any_position() {
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
    fn the_next_link_is_kept_verbatim() {
        let link = "https://h/beta/x?$skiptoken=%255Bcosmosdb%255D";
        let body = format!(r#"{{"@odata.nextLink":"{link}","value":[]}}"#);
        assert_eq!(collection(body.into(), "id").unwrap().next.as_deref(), Some(link));
    }

    #[test]
    fn truncated_and_malformed_responses_are_distinguished() {
        let whole = r#"{"value":[{"id":"1"},{"id":"2"}]}"#;
        for end in 0..whole.len() {
            assert_eq!(collection(whole[..end].into(), "id").unwrap_err(), DecodeError::Truncated, "{end}");
        }
        for body in ["<html>", "[]", "7", r#"{"value":7}"#, r#"{"value":{}}"#, r#"{"values":[]}"#, r#"{"value":null}"#]
        {
            assert_eq!(collection(body.into(), "id").unwrap_err(), DecodeError::Malformed, "{body}");
        }
    }

    #[test]
    fn a_singleton_is_one_object_with_or_without_id() {
        assert_eq!(singleton(br#"{"id":"1"}"#.into(), "id").unwrap().objects[0].1.as_deref(), Some("1"));
        assert_eq!(singleton(br#"{"a":1}"#.into(), "id").unwrap().objects[0].1, None);
        assert_eq!(singleton(b"[]".into(), "id").unwrap_err(), DecodeError::Malformed);
        assert_eq!(singleton(Vec::new(), "id").unwrap_err(), DecodeError::Truncated);
    }

    fn code(body: &str) -> Option<String> {
        match collection(body.into(), "id").unwrap_err() {
            DecodeError::Embedded(code) => code,
            other => panic!("{other:?}: {body}"),
        }
    }

    #[test]
    fn an_error_inside_a_page_makes_it_incomplete_and_keeps_its_code() {
        let error = r#"{"error":{"code":"InternalServerError","message":"x"}}"#;
        for body in [
            error.to_owned(),
            format!(r#"{{"value":[{{"id":"1"}},{error}]}}"#),
            format!(r#"{{"value":[{{"id":"1"}},{error}"#),
            format!(r#"{{"value":[{{"id":"1"}}{error}"#),
            format!(r#"{{"value":[{{"id":"1"}}],{}"#, &error[1..]),
            format!(r#"{{"value":[{{"id":"1","a":"b {error}"#),
        ] {
            assert_eq!(code(&body).as_deref(), Some("InternalServerError"), "{body}");
        }
        assert_eq!(
            singleton(error.into(), "id").unwrap_err(),
            DecodeError::Embedded(Some("InternalServerError".into()))
        );
        let quoted = r#"{"value":[{"id":"1","note":"{\"error\":{\"code\":\"x\"}}"},{"id":"2","error":{"code":"y"}}]}"#;
        assert_eq!(ids(quoted).len(), 2, "an object that has an id and an error is an object");
    }

    #[test]
    fn a_byte_order_mark_is_stripped_and_an_empty_next_link_is_the_end() {
        let page =
            collection(b"\xEF\xBB\xBF{\"value\":[{\"id\":\"1\"}],\"@odata.nextLink\":\"\"}".to_vec(), "id").unwrap();
        assert_eq!((page.objects.len(), page.next), (1, None));
        assert!(singleton(b"\xEF\xBB\xBF{\"id\":\"1\"}".to_vec(), "id").is_ok());
        let page = collection(br#"{"value":[],"@odata.nextLink":null}"#.to_vec(), "id").unwrap();
        assert_eq!(page.next, None);
    }

    #[test]
    fn one_bad_byte_or_control_character_costs_one_object() {
        for bad in [&b"\xff"[..], b"\x00", b"\x1b", b"\n", b"\xed\xa0\x80"] {
            let body = [br#"{"value":[{"id":"1"},{"id":"2","a":"x"#, bad, br#"y"},{"id":"3"}]}"#].concat();
            let page = collection(body, "id").unwrap();
            let ids: Vec<_> = page.objects.iter().map(|(_, id)| id.as_deref().unwrap()).collect();
            assert_eq!((ids, page.bad_objects), (vec!["1", "3"], 1), "{bad:?}");
        }
        let pretty = "{\n\t\"value\": [\r\n {\"id\": \"1\"} ] }";
        assert_eq!(collection(pretty.into(), "id").unwrap().bad_objects, 0);
    }

    #[test]
    fn elements_that_are_not_objects_are_counted_and_not_kept() {
        let page = collection(br#"{"value":[0,null,"x",[],{},{"id":"1"}]}"#.to_vec(), "id").unwrap();
        assert_eq!((page.objects.len(), page.bad_objects), (1, 5));
    }

    #[test]
    fn of_two_ids_the_first_one_counts_as_everywhere() {
        let body = r#"{"value":[{"id":"1","a":2,"id":"3"}]}"#;
        let page = collection(body.into(), "id").unwrap();
        let policy_type = CATALOG.get("roleScopeTag").unwrap();
        let item = RawObject::parse(page.objects[0].0.as_str()).unwrap().observe(policy_type).unwrap();
        assert_eq!((page.objects[0].1.as_deref(), item.external_id.as_str()), (Some("1"), "1"));
    }

    static CATALOG: LazyLock<Catalog> = LazyLock::new(Catalog::built_in);
    const PAGE: &str = r##"{"@odata.context":"c","@odata.count":2,"@odata.nextLink":"https://h/beta/x?$skip=2","value":[
        {"@odata.type":"#microsoft.graph.win32LobApp","id":"a\u00e4","displayName":"One","roleScopeTagIds":["0"],"size":1.5e3},
        {"id":7,"displayName":null,"nested":{"id":"no","list":[1,[2,{"x":null}]]}}]}"##;

    proptest! {
        #[test]
        fn objects_of_a_damaged_page_can_be_stored(
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
                prop_assert!(body.windows(text.len()).any(|bytes| bytes == text.as_bytes()), "{text}");
                let Ok(object) = RawObject::parse(text) else { continue };
                if let Ok(item) = object.observe(app) {
                    prop_assert!(!item.external_id.is_empty());
                }
            }
        }
    }
}
