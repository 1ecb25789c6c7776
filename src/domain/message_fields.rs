//! Fields of a JSON message, read without interpreting the unused ones.
//!
//! A value of an unknown key may nest to any depth or exceed every number format: it is checked against the grammar only.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::failure::{DeadReason, Rejection};

const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

/// Value of a JSON document that is not interpreted yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field<'a>(&'a RawValue);

impl<'a> Field<'a> {
    /// Parses a body, with or without a byte order mark.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, Rejection> {
        let text = body.strip_prefix(UTF8_MARK).unwrap_or(body);
        serde_json::from_slice(text).map(Self).map_err(|error| not_json(body, &error))
    }

    /// True for `null`, which counts as absent in optional fields.
    pub(super) fn is_null(self) -> bool {
        self.0.get() == "null"
    }

    pub(super) fn as_bool(self) -> Option<bool> {
        match self.0.get() {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// Number, as any JSON reader takes it: `1`, `1.0` and `1e0` are the same.
    pub(super) fn as_number(self) -> Option<f64> {
        (self.kind() == "a number").then(|| self.0.get().parse().ok()).flatten()
    }

    pub(super) fn as_str(self) -> Option<String> {
        serde_json::from_str(self.0.get()).ok()
    }

    /// Entries of an array.
    pub(super) fn entries(self) -> Option<Vec<Field<'a>>> {
        let entries: Vec<&RawValue> = serde_json::from_str(self.0.get()).ok()?;
        Some(entries.into_iter().map(Field).collect())
    }

    /// Kind of the value, for a rejection that must not quote it.
    pub(super) fn kind(self) -> &'static str {
        match self.0.get().as_bytes().first() {
            Some(b'n') => "null",
            Some(b't' | b'f') => "a boolean",
            Some(b'"') => "a string",
            Some(b'[') => "an array",
            Some(b'{') => "an object",
            _ => "a number",
        }
    }
}

/// Fields of a JSON object, each validated when it is asked for.
#[derive(Debug)]
pub(super) struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Fields of `value`, which is called `what` in a rejection.
    pub(super) fn of(what: &str, value: Field<'a>) -> Result<Self, Rejection> {
        if value.kind() != "an object" {
            return Err(invalid(format!("{what} is {}: expected an object", value.kind())));
        }
        let fields = serde_json::from_str(value.0.get());
        fields.map(Self).map_err(|_| invalid(format!("{what} has a key with an unpaired surrogate")))
    }

    pub(super) fn get(&self, name: &str) -> Option<Field<'a>> {
        self.0.get(name).copied().map(Field)
    }

    /// String field; `null` counts as absent.
    pub(super) fn string(&self, name: &str, expected: &str) -> Result<Option<String>, Rejection> {
        match self.get(name) {
            None => Ok(None),
            Some(field) if field.is_null() => Ok(None),
            Some(field) => match field.as_str() {
                Some(text) => Ok(Some(text)),
                None => Err(wrong(name, field, expected)),
            },
        }
    }

    pub(super) fn missing(&self, name: &str, expected: &str) -> Rejection {
        invalid(format!("`{name}` is missing: expected {expected}"))
    }
}

pub(super) fn invalid(detail: impl Into<String>) -> Rejection {
    Rejection::new(DeadReason::InvalidRequest, detail)
}

pub(super) fn wrong(name: &str, value: Field<'_>, expected: &str) -> Rejection {
    invalid(format!("`{name}` is {}: expected {expected}", value.kind()))
}

/// Names the usual reasons for a body that is no JSON before the position of the error.
fn not_json(body: &[u8], error: &serde_json::Error) -> Rejection {
    let detail = match body {
        [] => "not JSON: the body is empty".to_owned(),
        [0x1f, 0x8b, ..] => "not JSON: the body is gzip-compressed; publish it uncompressed".to_owned(),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{', 0, ..] | [0, b'{', ..] => {
            "not JSON: the body is UTF-16; publish UTF-8".to_owned()
        }
        _ => format!("not JSON: line {}, column {}", error.line(), error.column()),
    };
    Rejection::new(DeadReason::InvalidJson, detail)
}
