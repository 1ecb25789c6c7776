//! Permissions of this user, verified without storing, taking or declaring anything.
//!
//! RabbitMQ grants configure, write and read by patterns over the names of exchanges and queues.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::retry_tier::RetryTier;
use super::topology::{ACCESS_REFUSED, Deviations, Names, refusal};
use crate::config::TopologyMode;

/// Argument that RabbitMQ rejects after it checked the permission.
const PROBE: &str = "permission probe";

/// Kind of access that a permission grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Configure,
    Write,
    Read,
}

impl Access {
    const ALL: [Self; 3] = [Self::Configure, Self::Write, Self::Read];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Configure => "configure",
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// Exchange, queue, or both of one name, with the access that the daemon needs.
struct Needed {
    kind: &'static str,
    name: String,
    access: &'static [Access],
}

/// Accesses that a session uses after its topology was ensured.
fn used(names: &Names) -> Vec<Needed> {
    let exchanges = [&names.sync, &names.retry, &names.dead, &names.events].map(|name| (name, "exchange"));
    let write = exchanges.map(|(name, kind)| Needed { kind, name: name.clone(), access: &[Access::Write] });
    let read = Needed { kind: "queue", name: names.requests.clone(), access: &[Access::Read] };
    write.into_iter().chain([read]).collect()
}

/// All accesses that a mode needs: declaring on an empty virtual host takes every one on every name.
fn all(names: &Names, mode: TopologyMode) -> Vec<Needed> {
    if mode == TopologyMode::Verify {
        return used(names);
    }
    let of_kind = |kind, all: &[&String]| -> Vec<Needed> {
        all.iter().map(|name| Needed { kind, name: (*name).clone(), access: &Access::ALL }).collect()
    };
    let mut needed = of_kind("exchange", &[&names.sync, &names.retry, &names.events]);
    needed.extend(of_kind("exchange and queue", &[&names.dead, &names.dead_kept, &names.unrouted]));
    needed.extend(of_kind("queue", &[&names.requests]));
    needed.extend(of_kind("queue", &RetryTier::ALL.map(|tier| names.retry_queue(tier)).each_ref()));
    needed
}

/// Checks that this user may do what the daemon does. Once one permission is missing, all are looked at, so that one report
/// names all.
///
/// Each probe is invalid in itself: the broker checks the permission first and then refuses the probe, so that nothing is
/// stored, delivered or declared. Every refusal closes a channel and is a line in the broker's log.
pub(super) async fn check(
    connection: &Connection,
    names: &Names,
    mode: TopologyMode,
    found: &Deviations,
    limit: Duration,
) -> Result<(), BrokerError> {
    if found.refused.is_empty() && missing(connection, used(names), limit).await?.is_empty() {
        return Ok(());
    }
    let mut report = missing(connection, all(names, mode), limit).await?;
    if report.is_empty() {
        // An authorisation backend of the broker's may tell exchanges from queues, as the probes do not.
        report.clone_from(&found.refused);
    }
    report.push(cure(connection, names, mode));
    if !found.drift.is_empty() {
        report.push(BrokerError::Drift(found.drift.join("\n")).to_string());
    }
    Err(BrokerError::Permissions(report.join("\n")))
}

/// Lines for the missing permissions.
async fn missing(connection: &Connection, needed: Vec<Needed>, limit: Duration) -> Result<Vec<String>, BrokerError> {
    let mut lines = Vec::new();
    for Needed { kind, name, access } in needed {
        let mut lacking = Vec::new();
        for access in access {
            if denied(probe(connection, &name, *access, limit).await)? {
                lacking.push(access.as_str());
            }
        }
        if !lacking.is_empty() {
            lines.push(format!("{kind} {name}: no {} permission", lacking.join(", ")));
        }
    }
    Ok(lines)
}

/// Command that grants the documented permissions of a mode.
fn cure(connection: &Connection, names: &Names, mode: TopologyMode) -> String {
    let prefix = names.prefix().replace('.', "\\.");
    let pattern = |rest: &str| format!("'^{prefix}inventory\\.{rest}'");
    let (patterns, alternative) = match mode {
        TopologyMode::Declare => (
            [pattern(""), pattern(""), pattern("")],
            "\nif others declare the exchanges and queues, set topology.mode = \"verify\", which needs less",
        ),
        TopologyMode::Verify => {
            let (write, read) = (pattern("(sync|retry|dead|events)$"), pattern("(sync\\.requests|dead|dead\\.kept)$"));
            (["'^$'".to_owned(), write, read], "")
        }
    };
    let (host, user) = (quoted(&connection.virtual_host), quoted(&connection.user));
    let patterns = patterns.join(" ");
    format!(
        "grant them, in place of the user's present ones: `rabbitmqctl set_permissions -p {host} {user} {patterns}`{alternative}"
    )
}

/// Word of a shell command.
fn quoted(word: &str) -> String {
    if word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-@".contains(&byte)) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn denied(probe: Result<(), BrokerError>) -> Result<bool, BrokerError> {
    match probe {
        Ok(()) => Ok(false),
        Err(error) => refusal(&error).map(|(code, _)| code == ACCESS_REFUSED).ok_or(error),
    }
}

async fn probe(connection: &Connection, name: &str, access: Access, limit: Duration) -> Result<(), BrokerError> {
    match access {
        Access::Configure => configure(connection, name, limit).await,
        Access::Write => write(connection, name, limit).await,
        Access::Read => read(connection, name, limit).await,
    }
}

async fn configure(connection: &Connection, name: &str, limit: Duration) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let options = QueueDeclareOptions::durable();
    let declare = channel.queue_declare(name.into(), options, invalid("x-message-ttl"));
    within(limit, "checking permission to configure", declare).await.map(drop)
}

async fn write(connection: &Connection, exchange: &str, limit: Duration) -> Result<(), BrokerError> {
    let doing = "checking permission to write";
    let channel = connection.channel().await?;
    within(limit, doing, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let properties = BasicProperties::default().with_expiration(PROBE.into());
    let options = BasicPublishOptions::default();
    let confirm = channel.basic_publish(exchange.into(), "".into(), options, b"", properties);
    let confirm = within(limit, doing, confirm).await?;
    within(limit, doing, confirm).await.map(drop)
}

async fn read(connection: &Connection, queue: &str, limit: Duration) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let consume = channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), invalid("x-priority"));
    within(limit, "checking permission to read", consume).await.map(drop)
}

/// Arguments of which one has a type that RabbitMQ rejects.
fn invalid(argument: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert(argument.into(), AMQPValue::LongString(PROBE.into()));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_are_quoted_for_a_shell() {
        for (word, expected) in [("/", "/"), ("inventoryd", "inventoryd"), ("a b", "'a b'"), ("o'x$", r"'o'\''x$'")] {
            assert_eq!(quoted(word), expected);
        }
    }
}
