//! Text of a response body: byte order mark, encoding, and repair of single bad characters.

use std::ops::Range;

use serde::Deserialize;

use super::error_body::{self, BYTE_ORDER_MARK};

/// Reason why a response cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::graph) enum DecodeError {
    /// The text ends too early: it was cut in transit.
    Truncated,
    /// The text contains an error of Graph, with this code: the page is not complete.
    Embedded(Option<String>),
    /// The text is something else.
    Malformed,
}

/// Text of a response, repaired where single characters made it unreadable.
pub(super) struct BodyText {
    text: String,
    /// Positions of the repairs. An object that contains one is not kept: its text is no longer what Graph stores.
    repairs: Vec<usize>,
}

impl BodyText {
    pub(super) fn new(mut body: Vec<u8>) -> Result<Self, DecodeError> {
        if body.starts_with(BYTE_ORDER_MARK) {
            body.drain(..BYTE_ORDER_MARK.len());
        }
        match String::from_utf8(body) {
            Ok(text) => Ok(Self { text, repairs: Vec::new() }),
            Err(error) if error.utf8_error().error_len().is_none() => Err(DecodeError::Truncated),
            Err(error) => Ok(Self::repaired(error.as_bytes())),
        }
    }

    /// Decodes the text; one that cannot be parsed is repaired first, if that is possible.
    pub(super) fn decode<T>(self, decode: impl Fn(&Self) -> Result<T, DecodeError>) -> Result<T, DecodeError> {
        let result = decode(&self);
        if self.repairs.is_empty() && matches!(result, Err(DecodeError::Malformed | DecodeError::Embedded(_))) {
            let repaired = Self::repaired(self.text.as_bytes());
            if !repaired.repairs.is_empty() {
                return decode(&repaired);
            }
        }
        result
    }

    /// Replaces invalid UTF-8, and control characters within strings, by `?`.
    fn repaired(body: &[u8]) -> Self {
        let (mut text, mut repairs) = (String::with_capacity(body.len()), Vec::new());
        let mut state = InString::default();
        for chunk in body.utf8_chunks() {
            for character in chunk.valid().chars() {
                if state.next(character) && character < ' ' {
                    repairs.push(text.len());
                    text.push('?');
                } else {
                    text.push(character);
                }
            }
            if !chunk.invalid().is_empty() {
                repairs.push(text.len());
                text.push('?');
            }
        }
        Self { text, repairs }
    }

    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, DecodeError> {
        serde_json::from_str(&self.text).map_err(|error| match error_body::embedded_code(&self.text) {
            Some(code) => DecodeError::Embedded(Some(code)),
            None if error.is_eof() => DecodeError::Truncated,
            None => DecodeError::Malformed,
        })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn is_repaired(&self) -> bool {
        !self.repairs.is_empty()
    }

    /// Returns `true` if `part`, a slice of this text, contains a repair.
    pub(super) fn is_damaged(&self, part: &str) -> bool {
        let range = range_in(&self.text, part);
        let first = self.repairs.partition_point(|at| *at < range.start);
        self.repairs.get(first).is_some_and(|at| *at < range.end)
    }
}

/// Follows a JSON text character by character and knows which are within a string.
#[derive(Default)]
struct InString {
    inside: bool,
    escaped: bool,
}

impl InString {
    /// Takes the next character and returns `true` if it is part of a string.
    fn next(&mut self, character: char) -> bool {
        let inside = self.inside;
        if std::mem::take(&mut self.escaped) {
            return inside;
        }
        match character {
            '"' => self.inside = !inside,
            '\\' => self.escaped = inside,
            _ => {}
        }
        inside
    }
}

/// Position of `part`, which is a slice of `text`.
fn range_in(text: &str, part: &str) -> Range<usize> {
    let begin = part.as_ptr().addr() - text.as_ptr().addr();
    begin..begin + part.len()
}
