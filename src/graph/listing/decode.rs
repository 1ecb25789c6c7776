//! Decoder of one response of a list, straight from its bytes.
//!
//! Duplicate keys: the first one counts for the properties of an object, the last one within their values, as in PostgreSQL;
//! two `value` arrays are a decode error.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::body_text::{BodyText, DecodeError};
use super::error_body;
use crate::domain::catalog::Listing;
use crate::domain::item::{RawObject, RawObjects};
use crate::domain::observation::Observation;

/// Objects of a response and the link to the next page.
#[derive(Debug, Default)]
pub(in crate::graph) struct DecodedPage {
    /// Objects, in Graph's order.
    pub(in crate::graph) objects: Vec<DecodedObject>,
    /// Elements that are not objects, or are damaged: counted, not kept.
    pub(in crate::graph) bad_objects: usize,
    /// Next link, exactly as received.
    pub(in crate::graph) next: Option<String>,
}

/// An object's id, if it has one, and what was made of the object.
pub(in crate::graph) type DecodedObject = (Option<Box<str>>, Observation);

/// Envelope of a page. `@odata.count` is ignored: it is not a total.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    value: Option<RawObjects<'a>>,
    #[serde(rename = "@odata.nextLink", alias = "@nextLink", alias = "odata.nextLink")]
    next: Option<String>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// Decodes one page of a listing.
pub(in crate::graph) fn collection(body: Vec<u8>, listing: &Listing) -> Result<DecodedPage, DecodeError> {
    let id_property = listing.collection.id_property();
    BodyText::new(body)?.decode(|text| page(text, id_property, |object| listing.observe(object)))
}

/// Decodes one page of parents, of which only the ids count.
pub(in crate::graph) fn parents(body: Vec<u8>) -> Result<DecodedPage, DecodeError> {
    BodyText::new(body)?.decode(|text| page(text, "id", |_| Observation::NotSelected))
}

/// Decodes a singleton: one object, which need not have an id.
pub(in crate::graph) fn singleton(body: Vec<u8>, listing: &Listing) -> Result<DecodedPage, DecodeError> {
    BodyText::new(body)?.decode(|text| {
        let object: RawObject<'_> = text.parse()?;
        let id = id_of(&object, listing.collection.id_property())?;
        if is_damaged(&object, text) {
            return Err(DecodeError::Malformed);
        }
        Ok(DecodedPage { objects: vec![(id, listing.observe(&object))], bad_objects: 0, next: None })
    })
}

fn page(
    text: &BodyText,
    id_property: &str,
    observe: impl Fn(&RawObject<'_>) -> Observation,
) -> Result<DecodedPage, DecodeError> {
    let envelope: Envelope<'_> = text.parse()?;
    // An error beside the objects means that Graph failed after it had begun to respond.
    if envelope.error.is_some_and(|error| error.get() != "null") {
        return Err(DecodeError::Embedded(error_body::embedded_code(text.as_str())));
    }
    let raw = envelope.value.ok_or(DecodeError::Malformed)?;
    let (mut objects, mut bad_objects) = (Vec::with_capacity(raw.count()), raw.others);
    for object in raw.iter() {
        let id = id_of(&object, id_property)?;
        if is_damaged(&object, text) {
            bad_objects += 1;
        } else {
            objects.push((id, observe(&object)));
        }
    }
    Ok(DecodedPage { objects, bad_objects, next: envelope.next.filter(|link| !link.trim().is_empty()) })
}

/// Id of an object. What has none and is an OData error ends the page: Graph failed while it responded.
fn id_of(object: &RawObject<'_>, id_property: &str) -> Result<Option<Box<str>>, DecodeError> {
    match (object.id(id_property), object.error()) {
        (None, Some(error)) => Err(DecodeError::Embedded(error_body::code_of(error))),
        (id, _) => Ok(id.map(Box::from)),
    }
}

fn is_damaged(object: &RawObject<'_>, text: &BodyText) -> bool {
    text.is_repaired() && object.texts().any(|part| text.is_damaged(part))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::catalog::Catalog;

    static CATALOG: LazyLock<Catalog> = LazyLock::new(Catalog::built_in);

    /// Every type of the list that `policy_type` belongs to.
    fn listing(policy_type: &str) -> Listing {
        Listing::of_all_types(CATALOG.collection_of(CATALOG.get(policy_type).unwrap()))
    }

    fn collection(body: Vec<u8>) -> Result<DecodedPage, DecodeError> {
        super::collection(body, &listing("roleScopeTag"))
    }

    fn singleton(body: Vec<u8>) -> Result<DecodedPage, DecodeError> {
        super::singleton(body, &listing("remoteAssistanceSettings"))
    }

    fn ids(body: &str) -> Vec<Option<String>> {
        collection(body.into()).unwrap().objects.into_iter().map(|(id, _)| id.map(String::from)).collect()
    }

    #[test]
    fn ids_are_found_at_any_position() {
        let body = r#"{"@odata.count":0,"value":[{"a":{"id":"no"},"id":"1", "x":1.50},{"id":7},{"id":null},{"b":1}]}"#;
        assert_eq!(ids(body), [Some("1".to_owned()), Some("7".to_owned()), None, None]);
        assert_eq!(collection(body.into()).unwrap().next, None);
    }

    #[test]
    fn escaped_ids_and_other_id_properties_are_read() {
        assert_eq!(ids(r#"{"value":[{"id":"aäb\"c"}]}"#), [Some("aäb\"c".to_owned())]);
        let text = BodyText::new(br#"{"value":[{"id":"1","version":"2"}]}"#.into()).unwrap();
        let parsed = page(&text, "version", |_| Observation::NotSelected).unwrap();
        assert_eq!(parsed.objects[0].0.as_deref(), Some("2"));
    }

    #[test]
    fn the_next_link_is_kept_verbatim() {
        let link = "https://h/beta/x?$skiptoken=%255Bcosmosdb%255D";
        let body = format!(r#"{{"@odata.nextLink":"{link}","value":[]}}"#);
        assert_eq!(collection(body.into()).unwrap().next.as_deref(), Some(link));
    }

    #[test]
    fn truncated_and_malformed_responses_are_distinguished() {
        let whole = r#"{"value":[{"id":"1"},{"id":"2"}]}"#;
        for end in 0..whole.len() {
            assert_eq!(collection(whole[..end].into()).unwrap_err(), DecodeError::Truncated, "{end}");
        }
        for body in ["<html>", "[]", "7", r#"{"value":7}"#, r#"{"value":{}}"#, r#"{"values":[]}"#, r#"{"value":null}"#]
        {
            assert_eq!(collection(body.into()).unwrap_err(), DecodeError::Malformed, "{body}");
        }
    }

    #[test]
    fn a_singleton_is_one_object_with_or_without_id() {
        assert_eq!(singleton(br#"{"id":"1"}"#.into()).unwrap().objects[0].0.as_deref(), Some("1"));
        assert_eq!(singleton(br#"{"a":1}"#.into()).unwrap().objects[0].0, None);
        assert_eq!(singleton(b"[]".into()).unwrap_err(), DecodeError::Malformed);
        assert_eq!(singleton(Vec::new()).unwrap_err(), DecodeError::Truncated);
    }

    fn code(body: &str) -> Option<String> {
        match collection(body.into()).unwrap_err() {
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
        assert_eq!(singleton(error.into()).unwrap_err(), DecodeError::Embedded(Some("InternalServerError".into())));
        let quoted = r#"{"value":[{"id":"1","note":"{\"error\":{\"code\":\"x\"}}"},{"id":"2","error":{"code":"y"}}]}"#;
        assert_eq!(ids(quoted).len(), 2, "an object that has an id and an error is an object");
    }

    #[test]
    fn a_byte_order_mark_is_stripped_and_an_empty_next_link_is_the_end() {
        let page = collection(b"\xEF\xBB\xBF{\"value\":[{\"id\":\"1\"}],\"@odata.nextLink\":\"\"}".to_vec()).unwrap();
        assert_eq!((page.objects.len(), page.next), (1, None));
        assert!(singleton(b"\xEF\xBB\xBF{\"id\":\"1\"}".to_vec()).is_ok());
        let page = collection(br#"{"value":[],"@odata.nextLink":null}"#.to_vec()).unwrap();
        assert_eq!(page.next, None);
    }

    #[test]
    fn one_bad_byte_or_control_character_costs_one_object() {
        for bad in [&b"\xff"[..], b"\x00", b"\x1b", b"\n", b"\xed\xa0\x80"] {
            let body = [br#"{"value":[{"id":"1"},{"id":"2","a":"x"#, bad, br#"y"},{"id":"3"}]}"#].concat();
            let page = collection(body).unwrap();
            let ids: Vec<_> = page.objects.iter().map(|(id, _)| id.as_deref().unwrap()).collect();
            assert_eq!((ids, page.bad_objects), (vec!["1", "3"], 1), "{bad:?}");
        }
        let pretty = "{\n\t\"value\": [\r\n {\"id\": \"1\"} ] }";
        assert_eq!(collection(pretty.into()).unwrap().bad_objects, 0);
    }

    #[test]
    fn elements_that_are_not_objects_are_counted_and_not_kept() {
        let page = collection(br#"{"value":[0,null,"x",[],{},{"id":"1"}]}"#.to_vec()).unwrap();
        assert_eq!((page.objects.len(), page.bad_objects), (1, 5));
    }

    #[test]
    fn of_two_ids_the_first_one_counts_as_everywhere() {
        let body = r#"{"value":[{"id":"1","a":2,"id":"3"}]}"#;
        let page = collection(body.into()).unwrap();
        let (Some(id), Observation::Item(0, item)) = &page.objects[0] else { panic!("{page:?}") };
        assert_eq!((&**id, item.external_id.as_str()), ("1", "1"));
    }

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
            let _ = singleton(body.clone());
            let Ok(parsed) = super::collection(body, &listing("mobileApp")) else { return Ok(()) };
            for (_, observation) in &parsed.objects {
                if let Observation::Item(_, item) = observation {
                    prop_assert!(!item.external_id.is_empty() && !item.external_id.contains('\0'));
                    prop_assert!(serde_json::from_str::<serde_json::Value>(&item.meta).is_ok_and(|meta| meta.is_object()));
                }
            }
        }
    }
}
