//! Queues that differ from what the configuration wants, read from the broker's own words.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lapin::types::{AMQPValue, FieldTable};

/// The first difference of a queue and the others that were found with it.
pub(super) type Known = Mutex<HashMap<String, Vec<String>>>;

pub(super) fn lock(known: &Known) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// `x-delivery-limit is 10 on the broker, the configuration wants 20`, from the broker's own words.
pub(super) fn difference(words: &str) -> String {
    let parts = words.split_once("inequivalent arg '").and_then(|(_, rest)| {
        let (argument, rest) = rest.split_once('\'')?;
        let (wanted, found) = rest.split_once("received ")?.1.split_once(" but current is ")?;
        Some((argument, bare(wanted), bare(found)))
    });
    match parts {
        Some((argument, wanted, found)) => {
            format!("{argument} is {found} on the broker, the configuration wants {wanted}")
        }
        None => words.to_owned(),
    }
}

/// The arguments with the one that a line of [`difference`] is about as it is on the broker, if it is one of them.
pub(super) fn agree(arguments: &FieldTable, line: &str) -> Option<FieldTable> {
    let (argument, found) = line.split_once(": ")?.1.split_once(" is ")?;
    let found = found.split_once(" on the broker")?.0;
    let mut agreed = arguments.inner().clone();
    let wanted = agreed.remove(argument)?;
    let value = match (found, wanted) {
        ("none", _) => return Some(agreed.into()),
        (number, AMQPValue::LongLongInt(_)) => AMQPValue::LongLongInt(number.parse().ok()?),
        (words, _) => text(words),
    };
    agreed.insert(argument.into(), value);
    Some(agreed.into())
}

/// A value without the broker's decoration: `the value '20' of type 'signedint'` is `20`.
fn bare(value: &str) -> &str {
    let value = value.strip_prefix("the value ").unwrap_or(value);
    let value = value.split(" of type ").next().unwrap_or(value);
    value.trim().trim_matches('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_one_line_with_both_values() {
        let words = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost '/': received \
                     the value '20' of type 'signedint' but current is the value '10' of type 'long'";
        assert_eq!(difference(words), "x-delivery-limit is 10 on the broker, the configuration wants 20");
        let words = "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'e' in vhost '/': received 'topic' but \
                     current is 'direct'";
        assert_eq!(difference(words), "type is direct on the broker, the configuration wants topic");
        let words =
            "... inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received 'quorum' but current is none";
        assert_eq!(difference(words), "x-queue-type is none on the broker, the configuration wants quorum");
        assert_eq!(difference("PRECONDITION_FAILED - invalid arg"), "PRECONDITION_FAILED - invalid arg");
    }

    #[test]
    fn one_difference_is_agreed_to_so_that_the_next_comes_out() {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(20));
        arguments.insert("x-queue-type".into(), text("quorum"));
        let agreed =
            agree(&arguments, "queue q: x-delivery-limit is 10 on the broker, the configuration wants 20").unwrap();
        assert_eq!(agreed.inner().get("x-delivery-limit"), Some(&AMQPValue::LongLongInt(10)));
        let agreed =
            agree(&agreed, "queue q: x-queue-type is none on the broker, the configuration wants quorum").unwrap();
        assert!(!agreed.contains_key("x-queue-type"));
        assert_eq!(agree(&agreed, "queue q: x-queue-type is none on the broker, the configuration wants quorum"), None);
        assert_eq!(agree(&agreed, "queue q: durable is false on the broker, the configuration wants true"), None);
        assert_eq!(agree(&agreed, "queue q: is missing"), None);
    }
}
