//! A Graph object as received: its properties are found by name, and their values stay in the bytes of the page.

use std::borrow::Cow;
use std::fmt;

use memchr::memchr;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Initial capacity: the number of properties that a Graph object commonly has with our `$select`.
const USUAL_COUNT: usize = 24;

/// An object that can't be kept, with its id if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadObject {
    /// The object's id, if that much could be read.
    pub external_id: Option<String>,
}

/// A Graph object whose values borrow from the bytes of the page.
///
/// An object has a dozen or two properties; a linear search finds one faster than a sorted map would.
#[derive(Debug)]
pub struct RawObject<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> RawObject<'a> {
    /// Splits an object into its properties without copying their values.
    ///
    /// # Errors
    /// If `text` is not a JSON object.
    pub fn parse(text: &'a str) -> Result<Self, BadObject> {
        serde_json::from_str(text).map_err(|_| BadObject { external_id: None })
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
        deserializer.deserialize_map(PropertyVisitor).map(Self)
    }
}

struct PropertyVisitor;

impl<'de> Visitor<'de> for PropertyVisitor {
    type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut properties = Vec::with_capacity(USUAL_COUNT);
        while let Some((BorrowedText(name), value)) = map.next_entry()? {
            properties.push((name, value));
        }
        Ok(properties)
    }
}

/// A string that borrows from the input unless it contains escapes. Serde deserialises a bare `Cow<str>` as owned.
#[derive(Deserialize)]
struct BorrowedText<'a>(#[serde(borrow)] Cow<'a, str>);

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
