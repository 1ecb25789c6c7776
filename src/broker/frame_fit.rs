//! Content headers that fit into a frame.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use super::message::{Outgoing, is_ours};

/// Most that a content header can need beside its table: fixed fields, and short strings of 255 bytes each.
const OTHER_PROPERTIES_BYTES: usize = 2_700;

impl Outgoing {
    /// Properties whose content header fits into a frame. The broker closes the connection on a larger one, so the
    /// largest headers of the publisher are dropped; those of the daemon always fit.
    pub(super) fn properties_within(&self, frame_max: usize) -> BasicProperties {
        let Some(headers) = self.properties.headers() else { return self.properties.clone() };
        let capacity = frame_max.saturating_sub(OTHER_PROPERTIES_BYTES);
        if table_bytes(headers) <= capacity {
            return self.properties.clone();
        }
        let mut kept = headers.clone();
        let mut theirs: Vec<_> = headers.inner().iter().filter(|(name, _)| !is_ours(name.as_str())).collect();
        theirs.sort_by_key(|(_, value)| value_bytes(value));
        while table_bytes(&kept) > capacity
            && let Some((name, _)) = theirs.pop()
        {
            let mut rest = kept.inner().clone();
            rest.remove(name);
            kept = rest.into();
        }
        tracing::warn!(message_id = self.message_id, "headers of the publisher dropped: they do not fit into a frame");
        self.properties.clone().with_headers(kept)
    }
}

/// Size of an encoded headers table.
fn table_bytes(table: &FieldTable) -> usize {
    4 + table.inner().iter().map(|(name, value)| 2 + name.as_str().len() + value_bytes(value)).sum::<usize>()
}

fn value_bytes(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => 4 + bytes.as_slice().len(),
        AMQPValue::ShortString(text) => 1 + text.as_str().len(),
        AMQPValue::FieldTable(table) => table_bytes(table),
        AMQPValue::FieldArray(array) => 4 + array.as_slice().iter().map(|value| 1 + value_bytes(value)).sum::<usize>(),
        // All others have at most eight bytes.
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::message::{DEAD_DETAIL, DEAD_ID, Original, read_text, text_table};
    use crate::domain::failure::{DeadReason, Rejection};

    #[test]
    fn a_copy_drops_the_publishers_largest_headers_to_fit_a_frame() {
        let long = "x".repeat(130_900);
        let headers = text_table([("large", Some(&long)), ("team", Some("blue"))]);
        let properties = BasicProperties::default().with_headers(headers);
        let rejection = Rejection::new(DeadReason::UnknownTenant, "ü".repeat(600));
        let original = Original { properties: &properties, body: b"{}" };
        let copy = Outgoing::dead_letter(&original, &rejection, &"h".repeat(100));
        for (frame_max, team) in [(131_072, true), (4_096, true)] {
            let kept = copy.properties_within(frame_max);
            assert!(table_bytes(kept.headers().as_ref().unwrap()) + OTHER_PROPERTIES_BYTES <= frame_max);
            assert_eq!(read_text(&kept, "team").is_some(), team, "{frame_max}");
            assert_eq!(read_text(&kept, "large"), None);
            assert!(read_text(&kept, DEAD_DETAIL).is_some() && read_text(&kept, DEAD_ID).is_some());
        }
        assert!(read_text(&copy.properties_within(262_144), "large").is_some());
    }
}
