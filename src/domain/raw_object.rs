//! Graph objects as received: their properties are found by name, and their values stay in the bytes of the page.

use std::borrow::Cow;
use std::fmt;

use memchr::memchr;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// An object that can't be kept, with its id if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadObject {
    /// The object's id, if that much could be read.
    pub external_id: Option<String>,
}

/// Name and value of a property.
type Property<'a> = (Cow<'a, str>, &'a RawValue);

/// A Graph object whose values borrow from the bytes of the page.
///
/// An object has a dozen or two properties; a linear search finds one faster than a sorted map would.
pub struct RawObject<'a>(Cow<'a, [Property<'a>]>);

impl<'a> RawObject<'a> {
    /// Splits an object into its properties without copying their values.
    ///
    /// # Errors
    /// If `text` is not a JSON object.
    pub fn parse(text: &'a str) -> Result<Self, BadObject> {
        serde_json::from_str(text).map_err(|_| BadObject { external_id: None })
    }

    /// Id of the object: the text of a string or of a number.
    #[must_use]
    pub fn id(&self, property: &str) -> Option<Cow<'a, str>> {
        self.get(property).filter(|value| !value.get().starts_with(['t', 'f'])).and_then(scalar_text)
    }

    /// OData error that stands in place of an object.
    #[must_use]
    pub fn error(&self) -> Option<&'a str> {
        self.get("error").map(RawValue::get).filter(|error| *error != "null")
    }

    /// Parts of the page that the object consists of: its names, unless they contain escapes, and its values.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let as_written = |name| if let &Cow::Borrowed(name) = name { Some(name) } else { None };
        self.0.iter().flat_map(move |(name, value)| [as_written(name), Some(value.get())]).flatten()
    }

    /// Value of a property; the first one of a repeated property.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// Text of a property: a string as is, numbers and booleans as they are written.
    pub(super) fn text(&self, name: &str) -> Option<Cow<'a, str>> {
        scalar_text(self.get(name)?)
    }

    /// Text at a dotted path.
    pub(super) fn text_at(&self, path: &str) -> Option<Cow<'a, str>> {
        let Some((first, rest)) = path.split_once('.') else { return self.text(path) };
        let nested: RawObject<'a> = serde_json::from_str(self.get(first)?.get()).ok()?;
        nested.text_at(rest)
    }

    pub(super) fn odata_type(&self) -> Option<Cow<'a, str>> {
        self.text("@odata.type")
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawObject<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut objects = RawObjects::default();
        deserializer.deserialize_map(&mut objects)?;
        Ok(Self(Cow::Owned(objects.properties)))
    }
}

/// Most objects of one page; Graph's pages have at most 999. Each object becomes an item of some hundred bytes, however short
/// its text.
const MAX_OBJECTS: usize = 100_000;

/// The objects of a list, read in one pass over the bytes of the page.
#[derive(Default)]
pub struct RawObjects<'a> {
    /// Properties of all objects, one object after the other.
    properties: Vec<Property<'a>>,
    /// End of each object in `properties`.
    ends: Vec<usize>,
    /// Number of elements that are not objects, or have no properties: memory stays in proportion to the text.
    pub others: usize,
}

impl RawObjects<'_> {
    /// Number of objects.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Objects in the order of the list.
    pub fn iter(&self) -> impl Iterator<Item = RawObject<'_>> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(start, end)| RawObject(Cow::Borrowed(&self.properties[*start..*end])))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawObjects<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor)
    }
}

struct ListVisitor;

impl<'de> Visitor<'de> for ListVisitor {
    type Value = RawObjects<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut objects = RawObjects::default();
        while seq.next_element_seed(&mut objects)?.is_some() {
            if objects.count() > MAX_OBJECTS {
                return Err(A::Error::custom(format_args!("more than {MAX_OBJECTS} objects in a page")));
            }
        }
        Ok(objects)
    }
}

/// Takes the next element of the list.
impl<'de: 'a, 'a> DeserializeSeed<'de> for &mut RawObjects<'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de: 'a, 'a> Visitor<'de> for &mut RawObjects<'a> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let start = self.properties.len();
        while let Some((Name(name), value)) = map.next_entry()? {
            self.properties.push((name, value));
        }
        match self.properties.len() {
            end if end > start => self.ends.push(end),
            _ => self.others += 1,
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        self.others += 1;
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.others += 1;
        Ok(())
    }
}

/// A string that borrows from the input unless it contains escapes. Serde deserialises a bare `Cow<str>` as owned.
#[derive(Deserialize)]
struct BorrowedText<'a>(#[serde(borrow)] Cow<'a, str>);

/// Name of a property. A lone surrogate in it becomes U+FFFD: it costs no more than a name that nothing reads.
struct Name<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // As text serde_json would refuse a lone surrogate, and with it the page.
        deserializer.deserialize_bytes(NameVisitor).map(Name)
    }
}

struct NameVisitor;

impl<'de> Visitor<'de> for NameVisitor {
    type Value = Cow<'de, str>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a name")
    }

    fn visit_borrowed_bytes<E>(self, name: &'de [u8]) -> Result<Self::Value, E> {
        Ok(String::from_utf8_lossy(name))
    }

    fn visit_bytes<E>(self, name: &[u8]) -> Result<Self::Value, E> {
        Ok(Cow::Owned(String::from_utf8_lossy(name).into_owned()))
    }
}

/// Text of a scalar: a string as is, numbers and booleans as they are written.
fn scalar_text(raw: &RawValue) -> Option<Cow<'_, str>> {
    let text = raw.get();
    match text.as_bytes().first()? {
        b'"' => string_text(text),
        b'{' | b'[' | b'n' => None,
        _ => Some(Cow::Borrowed(text)),
    }
}

/// Text of a JSON string that was read as a [`RawValue`]: without escapes it is what stands between the quotes.
pub(super) fn string_text(json: &str) -> Option<Cow<'_, str>> {
    match memchr(b'\\', json.as_bytes()) {
        None => json.strip_prefix('"')?.strip_suffix('"').map(Cow::Borrowed),
        Some(_) => serde_json::from_str::<BorrowedText<'_>>(json).ok().map(|text| text.0),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn properties<'a>(object: &RawObject<'a>) -> Vec<(String, &'a str)> {
        object.0.iter().map(|(name, value)| (name.to_string(), value.get())).collect()
    }

    #[test]
    fn names_with_escapes_are_decoded() {
        let object = RawObject::parse(r#"{"\u0069d":7,"a":"\ud800"}"#).unwrap();
        assert_eq!(object.id("id").as_deref(), Some("7"));
        assert_eq!(object.texts().collect::<Vec<_>>(), ["7", "a", r#""\ud800""#]);
    }

    #[test]
    fn a_name_with_a_lone_surrogate_hides_no_other_property() {
        let objects: RawObjects<'_> = serde_json::from_str(r#"[{"\ud800\u0061":1,"id":"1"},{"id":"2"}]"#).unwrap();
        let ids: Vec<_> = objects.iter().map(|object| object.id("id").unwrap().into_owned()).collect();
        assert_eq!((ids, objects.others), (vec!["1".to_owned(), "2".to_owned()], 0));
    }

    #[test]
    fn a_page_has_at_most_a_hundred_thousand_objects() {
        let page = |objects: usize| format!("[{}]", vec![r#"{"a":1}"#; objects].join(","));
        let count = |text: &str| serde_json::from_str::<RawObjects<'_>>(text).map(|objects| objects.count()).ok();
        assert_eq!([count(&page(MAX_OBJECTS)), count(&page(MAX_OBJECTS + 1))], [Some(MAX_OBJECTS), None]);
    }

    #[test]
    fn an_id_is_a_string_or_a_number() {
        let id = |value| RawObject::parse(&format!(r#"{{"id":{value}}}"#)).unwrap().id("id").map(Cow::into_owned);
        assert_eq!([id(r#""a\n""#), id("-1.50")], [Some("a\n".to_owned()), Some("-1.50".to_owned())]);
        assert_eq!([id("null"), id("true"), id("{}"), id("[1]")], [const { None }; 4]);
    }

    /// Elements of lists: objects with every kind of value, and other values.
    const ELEMENTS: &[&str] = &[
        r#"{"id":"1","a":null}"#,
        r#" { "a" : [1, {"b": "]}"}] , "a":{"c":-1.5e3} }"#,
        r#"{"\u0061\"":"\\\"","ä":""}"#,
        r#"{"a":"\ud800"}"#,
        r#"{"\ud800":1,"a":2}"#,
        "{}",
        "[]",
        r#"[[{"a":1}], "}"]"#,
        r#""{\"a\":1}""#,
        "null",
        "false",
        "-7",
        "1e3",
        " 18446744073709551616 ",
    ];

    proptest! {
        #[test]
        fn a_list_has_the_objects_that_its_elements_are_when_parsed_alone(
            list in prop::collection::vec(prop::sample::select(ELEMENTS), 0..12),
        ) {
            let text = format!("[{}]", list.join(","));
            let objects: RawObjects<'_> = serde_json::from_str(&text).unwrap();
            let alone: Vec<RawObject<'_>> = list.iter().filter_map(|text| RawObject::parse(text).ok()).collect();
            let expected: Vec<_> = alone.iter().map(properties).filter(|object| !object.is_empty()).collect();
            prop_assert_eq!((objects.count(), objects.others), (expected.len(), list.len() - expected.len()));
            prop_assert_eq!(objects.iter().map(|object| properties(&object)).collect::<Vec<_>>(), expected);
        }
    }
}
