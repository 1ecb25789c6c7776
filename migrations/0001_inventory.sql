-- The inventory: what was last observed in each tenant, the runs that observed it, and the events that say so.
-- Every key begins with tenant_id, so that the schema distributes by tenant as it is.
-- No index stands on a column that every run rewrites (last_seen_*, lease_expires_at): it would take updates off the
-- heap-only path. The free space that such updates need is kept by fillfactor.

create table tenants (
    tenant_id           uuid        primary key,
    display_name        text        not null check (length(display_name) between 1 and 200),
    enabled             boolean     not null default true,
    max_concurrent_runs integer     check (max_concurrent_runs > 0),
    credential          text        not null default 'default' check (length(credential) between 1 and 100),
    created_at          timestamptz not null default now()
);
comment on table tenants is 'The tenants that may be asked for; a request for any other is dead-lettered.';
comment on column tenants.tenant_id is 'Entra directory id.';
comment on column tenants.display_name is 'Name for people.';
comment on column tenants.enabled is 'Requests of a disabled tenant end skipped, tenant_disabled.';
comment on column tenants.max_concurrent_runs is 'Running runs that it may have; null means limits.tenant_max_runs.';
comment on column tenants.credential is 'Name of the section graph.credentials.<name> that reads it.';
comment on column tenants.created_at is 'When it was registered.';

create table inventory_fleet (
    only_row boolean primary key default true check (only_row)
);
insert into inventory_fleet default values;
comment on table inventory_fleet is 'One row, locked while a strict limit over all tenants is checked.';
comment on column inventory_fleet.only_row is 'Always true: there is one fleet.';

create table inventory_sync_runs (
    tenant_id                  uuid        not null references tenants,
    id                         uuid        not null,
    idempotency_key            text        not null,
    selection_hash             text        not null,
    selection_payload          jsonb       not null,
    status                     text        not null check (status in ('running', 'success', 'partial', 'failed', 'skipped')),
    had_errors                 boolean     not null default false,
    error_codes                text[]      not null default '{}',
    error_context              jsonb       not null default '{}',
    items_observed_count       bigint      not null default 0,
    items_upserted_count       bigint      not null default 0,
    items_created_count        bigint      not null default 0,
    items_changed_count        bigint      not null default 0,
    errors_count               bigint      not null default 0,
    items_unclassified_count   bigint      not null default 0,
    graph_requests_count       bigint      not null default 0,
    graph_throttled_count      bigint      not null default 0,
    graph_throttle_wait_ms     bigint      not null default 0,
    graph_select_refused_count bigint      not null default 0,
    retry_after_s              integer,
    attempt                    integer     not null default 1,
    interruptions              integer     not null default 0,
    lease_owner                text,
    lease_expires_at           timestamptz,
    correlation_id             text,
    requested_by               text,
    traceparent                text,
    daemon_version             text        not null,
    started_at                 timestamptz not null default clock_timestamp(),
    finished_at                timestamptz,
    primary key (tenant_id, id),
    unique (tenant_id, idempotency_key),
    check ((status = 'running') = (finished_at is null)),
    check (status <> 'running' or lease_expires_at is not null)
) with (fillfactor = 50);
create unique index inventory_sync_runs_lock on inventory_sync_runs (tenant_id, selection_hash) where status = 'running';
create index inventory_sync_runs_latest on inventory_sync_runs (tenant_id, selection_hash, finished_at desc)
    where status in ('success', 'partial', 'failed');
create index inventory_sync_runs_ended on inventory_sync_runs (finished_at) where finished_at is not null;
comment on table inventory_sync_runs is 'One row for every try to observe a selection of a tenant. Terminal states never change.';
comment on column inventory_sync_runs.tenant_id is 'The tenant.';
comment on column inventory_sync_runs.id is 'UUID version 7; also the id of its event.';
comment on column inventory_sync_runs.idempotency_key is 'The key of the request: it never makes a second run.';
comment on column inventory_sync_runs.selection_hash is 'SHA-256 of the canonical selection, lower-case hex.';
comment on column inventory_sync_runs.selection_payload is 'The selection.';
comment on column inventory_sync_runs.status is 'running, then success, partial or failed; or skipped from the start.';
comment on column inventory_sync_runs.had_errors is 'Whether anything at all went wrong.';
comment on column inventory_sync_runs.error_codes is 'Distinct codes of the closed list, sorted.';
comment on column inventory_sync_runs.error_context is 'By type: code, http_status, graph_code, request_id. At most 4 KiB, no free text.';
comment on column inventory_sync_runs.items_observed_count is 'Distinct objects that Graph returned in scope.';
comment on column inventory_sync_runs.items_upserted_count is 'Rows written.';
comment on column inventory_sync_runs.items_created_count is 'Rows first seen.';
comment on column inventory_sync_runs.items_changed_count is 'Rows whose name, category, platform or meta changed.';
comment on column inventory_sync_runs.errors_count is 'Bad objects, and failures that ended a type.';
comment on column inventory_sync_runs.items_unclassified_count is 'Objects of shared collections that no policy type claims.';
comment on column inventory_sync_runs.graph_requests_count is 'Requests sent to Graph, retries included.';
comment on column inventory_sync_runs.graph_throttled_count is 'Answers that were 429 or 503.';
comment on column inventory_sync_runs.graph_throttle_wait_ms is 'Milliseconds waited because of them.';
comment on column inventory_sync_runs.graph_select_refused_count is 'Lists asked again without $select.';
comment on column inventory_sync_runs.retry_after_s is 'Seconds after which to ask again, where Graph wanted to be left alone.';
comment on column inventory_sync_runs.attempt is 'The fence: one more with every take-over; every write of the run checks it.';
comment on column inventory_sync_runs.interruptions is 'Take-overs that followed an orderly stop; they do not count as attempts.';
comment on column inventory_sync_runs.lease_owner is 'The replica that holds it; null once it was handed back.';
comment on column inventory_sync_runs.lease_expires_at is 'When another replica may take it over.';
comment on column inventory_sync_runs.correlation_id is 'Handed through from the request.';
comment on column inventory_sync_runs.requested_by is 'Handed through from the request.';
comment on column inventory_sync_runs.traceparent is 'W3C trace context of the request.';
comment on column inventory_sync_runs.daemon_version is 'Version of the daemon that admitted it.';
comment on column inventory_sync_runs.started_at is 'When it was admitted; a take-over does not move it.';
comment on column inventory_sync_runs.finished_at is 'When it ended.';

create table inventory_sync_run_types (
    tenant_id            uuid        not null,
    run_id               uuid        not null,
    policy_type          text        not null,
    status               text        not null check (status in ('complete', 'failed')),
    items_observed_count bigint      not null,
    items_upserted_count bigint      not null,
    items_created_count  bigint      not null,
    items_changed_count  bigint      not null,
    errors_count         bigint      not null,
    error_code           text,
    failure              jsonb,
    suspicious_drop      boolean     not null default false,
    finished_at          timestamptz not null default clock_timestamp(),
    primary key (tenant_id, run_id, policy_type),
    foreign key (tenant_id, run_id) references inventory_sync_runs on delete cascade
);
comment on table inventory_sync_run_types is 'How each selected policy type of a run ended. Rows of finished types are there while the run still works.';
comment on column inventory_sync_run_types.tenant_id is 'The tenant.';
comment on column inventory_sync_run_types.run_id is 'The run.';
comment on column inventory_sync_run_types.policy_type is 'The policy type, or category:NAME for an unknown category.';
comment on column inventory_sync_run_types.status is 'complete: read to its end; failed: not.';
comment on column inventory_sync_run_types.items_observed_count is 'Distinct objects that Graph returned.';
comment on column inventory_sync_run_types.items_upserted_count is 'Rows written.';
comment on column inventory_sync_run_types.items_created_count is 'Rows first seen.';
comment on column inventory_sync_run_types.items_changed_count is 'Rows that differ from before.';
comment on column inventory_sync_run_types.errors_count is 'Bad objects, and the failure that ended it.';
comment on column inventory_sync_run_types.error_code is 'Code of the failure, if there was one.';
comment on column inventory_sync_run_types.failure is 'code, http_status, graph_code, request_id.';
comment on column inventory_sync_run_types.suspicious_drop is 'Complete, but with far fewer objects than in the previous completed run.';
comment on column inventory_sync_run_types.finished_at is 'When it ended.';

create table inventory_items (
    tenant_id        uuid        not null,
    policy_type      text        not null,
    external_id      text        collate "C" not null,
    display_name     text,
    category         text        not null,
    platform         text,
    meta_jsonb       jsonb       not null,
    first_seen_at    timestamptz not null,
    last_changed_at  timestamptz not null,
    last_seen_at     timestamptz not null,
    last_seen_run_id uuid        not null,
    primary key (tenant_id, policy_type, external_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
comment on table inventory_items is 'Objects as last observed. Nothing is ever deleted here: what is missing is derived.';
comment on column inventory_items.tenant_id is 'The tenant.';
comment on column inventory_items.policy_type is 'The kind of object.';
comment on column inventory_items.external_id is 'Graph''s id of it, compared byte by byte: no update of a locale can damage the index.';
comment on column inventory_items.display_name is 'Its name, if it has one; at most 1,024 characters.';
comment on column inventory_items.category is 'Category of its policy type.';
comment on column inventory_items.platform is 'Platform that it is for, if that can be told.';
comment on column inventory_items.meta_jsonb is 'Its whitelisted properties.';
comment on column inventory_items.first_seen_at is 'When it was first observed.';
comment on column inventory_items.last_changed_at is 'When name, category, platform or meta last differed from before.';
comment on column inventory_items.last_seen_at is 'When it was last observed.';
comment on column inventory_items.last_seen_run_id is 'The run that last observed it.';

create table outbox_events (
    tenant_id      uuid        not null,
    id             uuid        not null,
    routing_key    text        not null,
    payload        text        not null,
    correlation_id text,
    traceparent    text,
    created_at     timestamptz not null default clock_timestamp(),
    claimed_until  timestamptz,
    claims         integer     not null default 0,
    sent_at        timestamptz,
    primary key (tenant_id, id)
) with (fillfactor = 70);
create index outbox_events_unsent on outbox_events (created_at) where sent_at is null;
create index outbox_events_sent on outbox_events (sent_at) where sent_at is not null;
comment on table outbox_events is 'Run-completed events, written in the transaction that ends the run and published from here at least once.';
comment on column outbox_events.tenant_id is 'The tenant.';
comment on column outbox_events.id is 'The run''s id, which is the event''s.';
comment on column outbox_events.routing_key is 'run.completed.<status>.<tenant_id>';
comment on column outbox_events.payload is 'The CloudEvents envelope, byte for byte as it is published.';
comment on column outbox_events.correlation_id is 'AMQP correlation id.';
comment on column outbox_events.traceparent is 'W3C trace context.';
comment on column outbox_events.created_at is 'When the run ended.';
comment on column outbox_events.claimed_until is 'Until when a replica has it in hand; after that another may publish it.';
comment on column outbox_events.claims is 'How often a replica took it in hand.';
comment on column outbox_events.sent_at is 'When the broker confirmed it.';

create table daemon_replicas (
    replica text        primary key,
    seen_at timestamptz not null
);
comment on table daemon_replicas is 'The replicas that live: Graph''s limits are divided by their number.';
comment on column daemon_replicas.replica is 'Name that the replica signs leases with.';
comment on column daemon_replicas.seen_at is 'When it last said that it lives.';

create table tenant_gates (
    tenant_id    uuid        not null,
    family       text        not null,
    closed_until timestamptz not null,
    primary key (tenant_id, family)
);
comment on table tenant_gates is 'Where Graph asked to be left alone: no replica asks the tenant before then.';
comment on column tenant_gates.tenant_id is 'The tenant.';
comment on column tenant_gates.family is 'Which limits of Graph: intune, devices, conditional_access or graph.';
comment on column tenant_gates.closed_until is 'When it may be asked again.';

create function inventory_missing_of_run(in_tenant_id uuid, in_run_id uuid)
    returns table (policy_type text, external_id text, display_name text, last_seen_at timestamptz,
                   last_seen_run_id uuid, confidence text, type_complete boolean)
    language sql stable parallel safe as $$
    select i.policy_type, i.external_id, i.display_name, i.last_seen_at, i.last_seen_run_id,
           case when r.status = 'success' and not r.had_errors and not t.suspicious_drop then 'high' else 'low' end,
           t.status = 'complete'
      from inventory_sync_runs r
      join inventory_sync_run_types t on t.tenant_id = r.tenant_id and t.run_id = r.id
      join inventory_items i on i.tenant_id = r.tenant_id and i.policy_type = t.policy_type
     where r.tenant_id = in_tenant_id and r.id = in_run_id
       and r.status in ('success', 'partial', 'failed')
       and i.last_seen_at < r.started_at
$$;
comment on function inventory_missing_of_run is
    'Items of the types that one completed run covered which neither it nor anything since has observed.';

create function inventory_missing(in_tenant_id uuid, in_selection_hash text)
    returns table (policy_type text, external_id text, display_name text, last_seen_at timestamptz,
                   last_seen_run_id uuid, confidence text, type_complete boolean)
    language sql stable parallel safe as $$
    select m.*
      from (select r.id from inventory_sync_runs r
             where r.tenant_id = in_tenant_id and r.selection_hash = in_selection_hash
               and r.status in ('success', 'partial', 'failed')
             order by r.finished_at desc limit 1) latest
     cross join lateral inventory_missing_of_run(in_tenant_id, latest.id) m
$$;
comment on function inventory_missing is
    'What is missing of a selection, relative to its latest completed run. No completed run: no rows.';

create view inventory_latest_runs with (security_invoker = true) as
    select distinct on (tenant_id, selection_hash)
           tenant_id, selection_hash, id as run_id, selection_payload, status, had_errors, error_codes,
           items_observed_count, items_upserted_count, items_created_count, items_changed_count, errors_count,
           started_at, finished_at
      from inventory_sync_runs
     where status in ('success', 'partial', 'failed')
     order by tenant_id, selection_hash, finished_at desc;
comment on view inventory_latest_runs is 'The latest completed run of every tenant and selection.';

create view inventory_items_current with (security_invoker = true) as
    select i.tenant_id, t.display_name as tenant_name, i.policy_type, i.external_id, i.display_name, i.category, i.platform,
           i.meta_jsonb, i.first_seen_at, i.last_changed_at, i.last_seen_at, i.last_seen_run_id
      from inventory_items i join tenants t using (tenant_id)
     where not exists (
           select from inventory_sync_runs r
             join inventory_sync_run_types rt on rt.tenant_id = r.tenant_id and rt.run_id = r.id
            where r.tenant_id = i.tenant_id and r.status in ('success', 'partial', 'failed')
              and rt.policy_type = i.policy_type and rt.status = 'complete' and not rt.suspicious_drop
              and i.last_seen_at < r.started_at);
comment on view inventory_items_current is
    'Items that no later complete listing of their type has failed to find. Doubtful ones (an incomplete or suspicious listing) stay in.';
