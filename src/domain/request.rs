//! The sync request: parses message bytes to a validated value, or to a rejection that names the field.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::failure::{DeadReason, Rejection};
use super::message_fields::{Field, Fields, invalid, wrong};
use super::selection::Selection;

/// Maximum size of a message body, in bytes.
pub const MAX_BODY_BYTES: usize = 256 * 1024;
/// Content type of a structured CloudEvents envelope.
pub const CLOUDEVENTS_CONTENT_TYPE: &str = "application/cloudevents+json";
/// Supported version of the message.
pub const SCHEMA_VERSION: u64 = 1;
const MAX_NAMES: usize = 1_000;

/// Request to observe a selection of a tenant, as published.
///
/// Unknown keys are ignored and never hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(title = "inventoryd sync request, version 1")]
pub struct SyncRequest {
    /// Message version: 1.
    #[schemars(extend("const" = 1))]
    pub schema_version: u64,
    /// Tenant: an Entra directory id in hyphenated form.
    pub tenant_id: Uuid,
    /// Idempotency key: a repeated key of a tenant never starts a second run. 1 to 200 visible ASCII characters.
    #[schemars(length(min = 1, max = 200), regex(pattern = "^[!-~]+$"))]
    pub idempotency_key: String,
    /// Policy types to observe.
    pub selection: Selection,
    /// Correlation id, copied to the run and its event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub correlation_id: Option<String>,
    /// Requester, recorded with the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub requested_by: Option<String>,
}

impl SyncRequest {
    /// JSON of the request, as a publisher would write it.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, numbers and booleans always serialise")
    }

    /// Parses a message body: bare, or the `data` of a CloudEvents envelope, depending on the content type.
    ///
    /// # Errors
    /// A [`Rejection`] with the reason and a detail that names the field, the kind of value found and the one expected.
    pub fn parse(content_type: Option<&str>, body: &[u8]) -> Result<Self, Rejection> {
        if body.len() > MAX_BODY_BYTES {
            return Err(Self::too_large(body.len() as u64));
        }
        let message = Fields::of("the message", Field::parse(body)?)?;
        if is_envelope(content_type) { Self::from_fields(&data_of(&message)?) } else { Self::from_fields(&message) }
    }

    /// Parses a message as [`Self::parse`] does, and names a content encoding that explains a body that is no JSON.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_encoded(
        content_type: Option<&str>,
        content_encoding: Option<&str>,
        body: &[u8],
    ) -> Result<Self, Rejection> {
        Self::parse(content_type, body).map_err(|mut rejection| {
            let encoding = content_encoding.and_then(compression);
            let is_explained = rejection.reason != DeadReason::InvalidJson || rejection.detail.contains("compressed");
            if let Some(encoding) = encoding.filter(|_| !is_explained) {
                rejection.detail += &format!("; content_encoding is {encoding}: publish the body uncompressed");
            }
            rejection
        })
    }

    /// Parses the selection of a document: a bare selection, a request, or an envelope with a request.
    ///
    /// # Errors
    /// A [`Rejection`] as for a message.
    pub fn parse_selection(body: &[u8]) -> Result<Selection, Rejection> {
        let document = Fields::of("the document", Field::parse(body)?)?;
        if document.get("specversion").is_some() {
            return Ok(Self::from_fields(&data_of(&document)?)?.selection);
        }
        match document.get("selection") {
            Some(selection) => parse_selection(&Fields::of("`selection`", selection)?),
            None => parse_selection(&document),
        }
    }

    /// True if the body is a CloudEvents envelope, whatever its content type says.
    #[must_use]
    pub fn looks_like_envelope(body: &[u8]) -> bool {
        let fields = Field::parse(body).and_then(|document| Fields::of("the document", document));
        fields.is_ok_and(|fields| fields.get("specversion").is_some())
    }

    /// Rejection of a body with so many bytes.
    #[must_use]
    pub fn too_large(bytes: u64) -> Rejection {
        let detail = format!("the body has {bytes} bytes; at most {MAX_BODY_BYTES} are allowed");
        Rejection::new(DeadReason::MessageTooLarge, detail)
    }

    fn from_fields(message: &Fields<'_>) -> Result<Self, Rejection> {
        check_version(message)?;
        let selection = message.get("selection").ok_or_else(|| message.missing("selection", "an object"))?;
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            tenant_id: tenant_id(message)?,
            idempotency_key: idempotency_key(message)?,
            selection: parse_selection(&Fields::of("`selection`", selection)?)?,
            correlation_id: label(message, "correlation_id")?,
            requested_by: label(message, "requested_by")?,
        })
    }
}

/// Compares the media type without case and parameters, as RFC 9110 defines it.
fn is_envelope(content_type: Option<&str>) -> bool {
    let media_type = content_type.and_then(|text| text.split(';').next()).unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case(CLOUDEVENTS_CONTENT_TYPE)
}

/// Name of a compression, from a closed list: a rejection never quotes the message.
fn compression(content_encoding: &str) -> Option<&'static str> {
    const KNOWN: [&str; 6] = ["gzip", "x-gzip", "deflate", "br", "zstd", "compress"];
    KNOWN.into_iter().find(|known| content_encoding.trim().eq_ignore_ascii_case(known))
}

fn data_of<'a>(envelope: &Fields<'a>) -> Result<Fields<'a>, Rejection> {
    let missing = "`data` is missing: a CloudEvents envelope must contain the request there, as JSON (not data_base64)";
    Fields::of("`data`", envelope.get("data").ok_or_else(|| invalid(missing))?)
}

fn check_version(message: &Fields<'_>) -> Result<(), Rejection> {
    let expected = "the integer 1";
    let Some(value) = message.get("schema_version") else {
        let hint = if message.get("specversion").is_some() {
            "; this looks like a CloudEvents envelope: publish it with content type application/cloudevents+json"
        } else {
            ""
        };
        return Err(invalid(format!("`schema_version` is missing: expected {expected}{hint}")));
    };
    match value.as_number().filter(|number| number.fract() == 0.0 && *number >= 0.0) {
        // An integer in the sense of JSON Schema: 1.0 is 1.
        Some(number) if number == SCHEMA_VERSION as f64 => Ok(()),
        Some(other) => {
            let detail = format!("`schema_version` is {other}: this daemon supports version {SCHEMA_VERSION}");
            Err(Rejection::new(DeadReason::UnsupportedVersion, detail))
        }
        None => Err(wrong("schema_version", value, expected)),
    }
}

fn tenant_id(message: &Fields<'_>) -> Result<Uuid, Rejection> {
    let expected = "a GUID such as 6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d";
    let text = message.string("tenant_id", expected)?.ok_or_else(|| message.missing("tenant_id", expected))?;
    match Uuid::try_parse(&text) {
        Ok(id) if text.len() == 36 && !id.is_nil() => Ok(id),
        _ => Err(invalid(format!("`tenant_id` is a string that is not a GUID: expected {expected}"))),
    }
}

fn idempotency_key(message: &Fields<'_>) -> Result<String, Rejection> {
    let expected = "1 to 200 visible ASCII characters";
    let key =
        message.string("idempotency_key", expected)?.ok_or_else(|| message.missing("idempotency_key", expected))?;
    if !(1..=200).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let what = if key.is_ascii() { "characters" } else { "bytes, not all ASCII" };
        return Err(invalid(format!("`idempotency_key` has {} {what}: expected {expected}, no spaces", key.len())));
    }
    Ok(key)
}

/// Optional short text that is stored and published unchanged.
fn label(message: &Fields<'_>, name: &str) -> Result<Option<String>, Rejection> {
    let expected = "1 to 200 characters without control characters";
    let Some(text) = message.string(name, expected)? else { return Ok(None) };
    let length = text.chars().count();
    if !(1..=200).contains(&length) || text.chars().any(char::is_control) {
        return Err(invalid(format!("`{name}` is a string of {length} characters: expected {expected}")));
    }
    Ok(Some(text))
}

fn parse_selection(fields: &Fields<'_>) -> Result<Selection, Rejection> {
    let include_foundations = match fields.get("include_foundations").filter(|field| !field.is_null()) {
        None => true,
        Some(field) => field.as_bool().ok_or_else(|| wrong("selection.include_foundations", field, "true or false"))?,
    };
    let selection = Selection {
        categories: names(fields, "categories")?,
        include_foundations,
        policy_types: names(fields, "policy_types")?,
    };
    if selection.is_empty() {
        return Err(invalid(
            "`selection` selects nothing: name policy_types or categories, or leave include_foundations true",
        ));
    }
    Ok(selection)
}

fn names(fields: &Fields<'_>, key: &str) -> Result<BTreeSet<String>, Rejection> {
    let name = format!("selection.{key}");
    let Some(field) = fields.get(key).filter(|field| !field.is_null()) else { return Ok(BTreeSet::new()) };
    let list = field.entries().ok_or_else(|| wrong(&name, field, "an array of names"))?;
    if list.len() > MAX_NAMES {
        return Err(invalid(format!("`{name}` has {} entries: at most {MAX_NAMES} are allowed", list.len())));
    }
    let entry = |(index, value): (usize, Field<'_>)| match value.as_str() {
        Some(text) if usable_name(&text) => Ok(text),
        Some(_) => Err(invalid(format!(
            "`{name}[{index}]` is not a valid name: expected 1 to 200 characters without control characters"
        ))),
        None => Err(wrong(&format!("{name}[{index}]"), value, "a name as a string")),
    };
    list.into_iter().enumerate().map(entry).collect()
}

fn usable_name(text: &str) -> bool {
    (1..=200).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
