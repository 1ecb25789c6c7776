//! The outbox: claimed, published by the relay, marked. There is no cursor, because rows commit out of order.

use uuid::Uuid;

use super::{Store, StoreError};

/// An event that waits to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxEvent {
    /// The tenant.
    pub tenant_id: Uuid,
    /// The run's id, which is the event's.
    pub id: Uuid,
    /// `run.completed.<status>.<tenant_id>`
    pub routing_key: String,
    /// The envelope, byte for byte.
    pub payload: String,
    /// AMQP correlation id.
    pub correlation_id: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// What waits in the outbox.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Backlog {
    /// Events not yet confirmed.
    pub unsent: i64,
    /// Age of the oldest, in seconds of the database's clock.
    pub oldest_age_s: f64,
}

impl Store {
    /// Takes unsent events in hand for `claim_s` seconds; other replicas take others. The claim is committed before
    /// anything is published, so that no transaction stays open meanwhile.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn claim_events(&self, limit: u32, claim_s: u64) -> Result<Vec<OutboxEvent>, StoreError> {
        let events = sqlx::query_as!(
            OutboxEvent,
            "with due as (
               select tenant_id, id from outbox_events
                where sent_at is null and (claimed_until is null or claimed_until < clock_timestamp())
                order by created_at limit $1 for update skip locked)
             update outbox_events e set claimed_until = clock_timestamp() + make_interval(secs => $2), claims = claims + 1
               from due where e.tenant_id = due.tenant_id and e.id = due.id
             returning e.tenant_id, e.id, e.routing_key, e.payload, e.correlation_id, e.traceparent",
            i64::from(limit),
            claim_s as f64
        );
        self.in_time(async { Ok(events.fetch_all(&self.control).await?) }).await
    }

    /// Records that the broker has confirmed events.
    ///
    /// # Errors
    /// If the database is away; then they are published once more, with the same ids.
    pub async fn mark_sent(&self, events: &[(Uuid, Uuid)]) -> Result<(), StoreError> {
        let (tenants, ids): (Vec<Uuid>, Vec<Uuid>) = events.iter().copied().unzip();
        let marked = sqlx::query!(
            "update outbox_events e set sent_at = clock_timestamp(), claimed_until = null
               from unnest($1::uuid[], $2::uuid[]) as s(tenant_id, id)
              where e.tenant_id = s.tenant_id and e.id = s.id and e.sent_at is null",
            &tenants,
            &ids
        )
        .execute(&self.control);
        self.in_time(async { Ok(marked.await?) }).await?;
        Ok(())
    }

    /// Puts events back that no queue took: they are due again after a wait that doubles with every claim, from five
    /// seconds to five minutes.
    ///
    /// # Errors
    /// If the database is away; then the claims run out by themselves.
    pub async fn release_events(&self, events: &[(Uuid, Uuid)]) -> Result<(), StoreError> {
        let (tenants, ids): (Vec<Uuid>, Vec<Uuid>) = events.iter().copied().unzip();
        let released = sqlx::query!(
            "update outbox_events e
                set claimed_until = clock_timestamp() + least(5 * power(2, least(claims, 10) - 1), 300) * interval '1 second'
               from unnest($1::uuid[], $2::uuid[]) as s(tenant_id, id)
              where e.tenant_id = s.tenant_id and e.id = s.id and e.sent_at is null",
            &tenants,
            &ids
        )
        .execute(&self.control);
        self.in_time(async { Ok(released.await?) }).await?;
        Ok(())
    }

    /// Puts events back that never got to a broker: they are due at once, for whichever replica reaches one first.
    ///
    /// # Errors
    /// If the database is away; then the claims run out by themselves.
    pub async fn give_back_events(&self, events: &[(Uuid, Uuid)]) -> Result<(), StoreError> {
        let (tenants, ids): (Vec<Uuid>, Vec<Uuid>) = events.iter().copied().unzip();
        let given_back = sqlx::query!(
            "update outbox_events e set claimed_until = null, claims = greatest(claims - 1, 0)
               from unnest($1::uuid[], $2::uuid[]) as s(tenant_id, id)
              where e.tenant_id = s.tenant_id and e.id = s.id and e.sent_at is null",
            &tenants,
            &ids
        )
        .execute(&self.control);
        self.in_time(async { Ok(given_back.await?) }).await?;
        Ok(())
    }

    /// What waits in the outbox.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn outbox_backlog(&self) -> Result<Backlog, StoreError> {
        let backlog = sqlx::query_as!(
            Backlog,
            r#"select count(*) as "unsent!",
                      coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 as "oldest_age_s!"
                 from outbox_events where sent_at is null"#
        );
        self.in_time(async { Ok(backlog.fetch_one(&self.control).await?) }).await
    }
}
