//! Permissions of this user that the topology does not exercise, verified without storing or taking a message.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::topology::{Names, refusal};

/// Code of a channel closed over a missing permission.
const ACCESS_REFUSED: u16 = 403;

/// Checks that this user may write to the exchanges and read the queue that the daemon uses.
///
/// Each probe is invalid in itself: the broker checks the permission first and then refuses the probe, so that nothing is
/// stored or delivered. Every refusal closes a channel and is a line in the broker's log.
pub(super) async fn check(connection: &Connection, names: &Names, limit: Duration) -> Result<(), BrokerError> {
    let mut missing = Vec::new();
    for exchange in [&names.sync, &names.retry, &names.dead, &names.events] {
        if denied(write(connection, exchange, limit).await)? {
            missing.push(format!("exchange {exchange}: no write permission"));
        }
    }
    if denied(read(connection, &names.requests, limit).await)? {
        missing.push(format!("queue {}: no read permission", names.requests));
    }
    if missing.is_empty() { Ok(()) } else { Err(BrokerError::Permissions(missing.join("\n"))) }
}

fn denied(probe: Result<(), BrokerError>) -> Result<bool, BrokerError> {
    match probe {
        Ok(()) => Ok(false),
        Err(error) => refusal(&error).map(|(code, _)| code == ACCESS_REFUSED).ok_or(error),
    }
}

async fn write(connection: &Connection, exchange: &str, limit: Duration) -> Result<(), BrokerError> {
    let doing = "checking permission to write";
    let channel = connection.channel().await?;
    within(limit, doing, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let properties = BasicProperties::default().with_expiration("permission probe".into());
    let options = BasicPublishOptions::default();
    let confirm = channel.basic_publish(exchange.into(), "".into(), options, b"", properties);
    let confirm = within(limit, doing, confirm).await?;
    within(limit, doing, confirm).await.map(drop)
}

async fn read(connection: &Connection, queue: &str, limit: Duration) -> Result<(), BrokerError> {
    let channel = connection.channel().await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-priority".into(), AMQPValue::LongString("permission probe".into()));
    let consume = channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), arguments);
    within(limit, "checking permission to read", consume).await.map(drop)
}
