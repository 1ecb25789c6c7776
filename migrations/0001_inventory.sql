-- The inventory: what was last observed in each tenant, the runs that observed it, and the events that are due.
--
-- Conventions
-- * Every key starts with tenant_id, so that the schema can be distributed or partitioned by tenant unchanged.
-- * Columns that are compared in a key are collated "C": byte order needs no locale, and an update of the operating
--   system's locales cannot corrupt their indexes.
-- * No index covers a column that every run rewrites (last_seen_*, lease_expires_at): such an index would turn heap-only
--   updates into full ones. `fillfactor` keeps the free space that heap-only updates need.
-- * Functions in SQL have standard bodies (`begin atomic`), whose names are resolved once, when they are created; the others
--   pin their search_path. No setting of a session changes what they read. Those that only other functions call inherit the
--   settings of their caller: setting them again would cost as much as one of their statements.
-- * What a run does is one function of one tenant, whose id is its first argument: each is one transaction, which a distributed
--   database can hand whole to the node of the tenant. Their statements go by keys, so one plan serves all calls, and planning
--   would take longer than executing. No update or delete in them calls a volatile function, which Citus does not hand over.

create table tenants (
    tenant_id           uuid        primary key,
    display_name        text        not null check (length(display_name) between 1 and 200),
    enabled             boolean     not null default true,
    max_concurrent_runs integer     check (max_concurrent_runs > 0),
    credential          text        not null default 'default' check (length(credential) between 1 and 100),
    created_at          timestamptz not null default now()
);
comment on table tenants is 'Registered tenants; a request for any other tenant is dead-lettered.';
comment on column tenants.tenant_id is 'Entra directory id.';
comment on column tenants.display_name is 'Name for people.';
comment on column tenants.enabled is 'A request for a disabled tenant is recorded as skipped, tenant_disabled.';
comment on column tenants.max_concurrent_runs is 'Limit of concurrent runs; null means limits.tenant_max_runs.';
comment on column tenants.credential is 'Name of the section graph.credentials.<name> used to read the tenant.';
comment on column tenants.created_at is 'Time of registration.';

create table policy_types (
    policy_type text    collate "C" primary key,
    label       text    not null,
    category    text    not null,
    supported   boolean not null
);
comment on table policy_types is 'Policy types that the daemons list, written by each daemon when it starts.';
comment on column policy_types.policy_type is 'Key of the type.';
comment on column policy_types.label is 'Name for people.';
comment on column policy_types.category is 'Category of the type.';
comment on column policy_types.supported is 'False once the daemon that started last has no contract for the type.';

-- Replaced by every migration that an older daemon cannot work on. A migration that only adds leaves it alone, so that the
-- replicas of a rolling upgrade restart on either version.
create function inventory_oldest_migration() returns bigint
    language sql immutable parallel safe
    return 1;
comment on function inventory_oldest_migration is
    'Oldest migration whose daemons work on this schema: those that know it as their newest, or a later one.';

create table inventory_fleet (
    only_row boolean primary key default true check (only_row)
);
insert into inventory_fleet default values;
comment on table inventory_fleet is 'One row, locked while the limit over all tenants is checked.';
comment on column inventory_fleet.only_row is 'Always true: there is one fleet.';

create table inventory_sync_runs (
    tenant_id                  uuid        not null references tenants,
    id                         uuid        not null,
    idempotency_key            text        collate "C" not null,
    selection_hash             text        collate "C" not null,
    selection_payload          jsonb       not null,
    status                     text        collate "C" not null,
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
    missing_high_count         bigint      not null default 0,
    missing_low_count          bigint      not null default 0,
    retry_after_s              integer,
    attempt                    integer     not null default 1,
    interruptions              integer     not null default 0,
    lease_owner                text,
    lease_expires_at           timestamptz,
    republished_at             timestamptz,
    correlation_id             text,
    requested_by               text,
    traceparent                text,
    daemon_version             text        not null,
    started_at                 timestamptz not null default clock_timestamp(),
    finished_at                timestamptz,
    primary key (tenant_id, id),
    unique (tenant_id, idempotency_key),
    -- One check: PostgreSQL parses each again for every statement that writes a run.
    check (case when finished_at is null then status = 'running' and lease_expires_at is not null
                else status in ('success', 'partial', 'failed', 'skipped') end)
) with (fillfactor = 50);
create unique index inventory_sync_runs_lock on inventory_sync_runs (tenant_id, selection_hash) where status = 'running';
create index inventory_sync_runs_id on inventory_sync_runs (id);
comment on table inventory_sync_runs is 'One row for each attempt to observe a selection of a tenant. Terminal states never change.';
comment on index inventory_sync_runs_lock is 'At most one running run of a tenant and selection: the row is the lock.';
comment on index inventory_sync_runs_id is 'Ids start with the time by the database clock: newest runs first, and old runs for retention.';
comment on column inventory_sync_runs.tenant_id is 'The tenant.';
comment on column inventory_sync_runs.id is 'UUID version 7 by the database clock; also the id of the event.';
comment on column inventory_sync_runs.idempotency_key is 'Key of the request; it never creates a second run.';
comment on column inventory_sync_runs.selection_hash is 'SHA-256 of the canonical selection, lower-case hex.';
comment on column inventory_sync_runs.selection_payload is 'The selection.';
comment on column inventory_sync_runs.status is 'running, then success, partial or failed; or skipped from the start.';
comment on column inventory_sync_runs.had_errors is 'True if there is any error code or a counted error.';
comment on column inventory_sync_runs.error_codes is 'Distinct codes of the closed list, sorted.';
comment on column inventory_sync_runs.error_context is 'By type: code, http_status, graph_code, request_id. At most 4 KiB, no free text.';
comment on column inventory_sync_runs.items_observed_count is 'Distinct objects that Graph returned in scope.';
comment on column inventory_sync_runs.items_upserted_count is 'Rows written.';
comment on column inventory_sync_runs.items_created_count is 'Rows first seen since the run started.';
comment on column inventory_sync_runs.items_changed_count is 'Rows whose name, category, platform or meta changed since the run started.';
comment on column inventory_sync_runs.errors_count is 'Unreadable objects, and failures that ended a type.';
comment on column inventory_sync_runs.items_unclassified_count is 'Objects of shared collections that no policy type claims.';
comment on column inventory_sync_runs.graph_requests_count is 'Requests sent to Graph, retries included.';
comment on column inventory_sync_runs.graph_throttled_count is 'Responses with status 429 or 503.';
comment on column inventory_sync_runs.graph_throttle_wait_ms is 'Milliseconds waited because of throttling, over all attempts.';
comment on column inventory_sync_runs.graph_select_refused_count is 'Lists requested again without $select.';
comment on column inventory_sync_runs.missing_high_count is 'Items missing with high confidence when the run ended.';
comment on column inventory_sync_runs.missing_low_count is 'Items missing with low confidence when the run ended.';
comment on column inventory_sync_runs.retry_after_s is 'Seconds after which to request again, if Graph throttled the run.';
comment on column inventory_sync_runs.attempt is 'Fencing token: each take-over increments it, and each write of the run checks it.';
comment on column inventory_sync_runs.interruptions is 'Take-overs after an orderly hand-back; they do not count against run.max_attempts.';
comment on column inventory_sync_runs.lease_owner is 'Replica that holds the lease; null once it was handed back.';
comment on column inventory_sync_runs.lease_expires_at is 'Time from which another replica may take the run over.';
comment on column inventory_sync_runs.republished_at is 'Last time that the request was published again for a run that nobody worked on.';
comment on column inventory_sync_runs.correlation_id is 'Copied from the request.';
comment on column inventory_sync_runs.requested_by is 'Copied from the request.';
comment on column inventory_sync_runs.traceparent is 'W3C trace context of the request.';
comment on column inventory_sync_runs.daemon_version is 'Version of the daemon that admitted the run.';
comment on column inventory_sync_runs.started_at is 'Time of admission; a take-over does not change it.';
comment on column inventory_sync_runs.finished_at is 'Time of the terminal state.';

create table inventory_sync_run_types (
    tenant_id            uuid        not null,
    run_id               uuid        not null,
    policy_type          text        collate "C" not null,
    status               text        not null check (status in ('complete', 'failed', 'not_applicable')),
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
comment on table inventory_sync_run_types is 'Outcome of each selected policy type of a run, recorded while the run goes on.';
comment on column inventory_sync_run_types.tenant_id is 'The tenant.';
comment on column inventory_sync_run_types.run_id is 'The run.';
comment on column inventory_sync_run_types.policy_type is 'The policy type, or category:NAME for an unknown category.';
comment on column inventory_sync_run_types.status is
    'complete: read to the end. failed: not. not_applicable: the tenant or the cloud does not have it, and the request did not name it.';
comment on column inventory_sync_run_types.items_observed_count is 'Distinct objects that Graph returned.';
comment on column inventory_sync_run_types.items_upserted_count is 'Rows written.';
comment on column inventory_sync_run_types.items_created_count is 'Rows first seen since the run started.';
comment on column inventory_sync_run_types.items_changed_count is 'Rows that changed since the run started.';
comment on column inventory_sync_run_types.errors_count is 'Unreadable objects, and the failure that ended the type.';
comment on column inventory_sync_run_types.error_code is 'Code of the failure, if there was one.';
comment on column inventory_sync_run_types.failure is 'code, http_status, graph_code, request_id.';
comment on column inventory_sync_run_types.suspicious_drop is 'Complete, but with far fewer objects than the previous complete listing.';
comment on column inventory_sync_run_types.finished_at is 'Time of the outcome.';

create table inventory_complete_listings (
    tenant_id            uuid        not null,
    policy_type          text        collate "C" not null,
    started_at           timestamptz not null,
    items_observed_count bigint      not null,
    evidence_at          timestamptz,
    primary key (tenant_id, policy_type)
) with (fillfactor = 70);
comment on table inventory_complete_listings is 'Latest complete listing of each policy type of a tenant. Retention never deletes it: it is the evidence that unseen items are gone.';
comment on column inventory_complete_listings.tenant_id is 'The tenant.';
comment on column inventory_complete_listings.policy_type is 'The policy type.';
comment on column inventory_complete_listings.started_at is 'Start of the run that made the latest complete listing.';
comment on column inventory_complete_listings.items_observed_count is 'Objects in it.';
comment on column inventory_complete_listings.evidence_at is
    'Start of the latest run whose listing was complete, without unreadable objects and no suspicious drop: an item not seen since is gone.';

create table inventory_selections (
    tenant_id         uuid        not null,
    selection_hash    text        collate "C" not null,
    latest_run_id     uuid        not null,
    latest_success_at timestamptz,
    primary key (tenant_id, selection_hash)
) with (fillfactor = 70);
comment on table inventory_selections is 'Latest completed run of each selection of a tenant. Retention keeps that run.';
comment on column inventory_selections.tenant_id is 'The tenant.';
comment on column inventory_selections.selection_hash is 'The selection.';
comment on column inventory_selections.latest_run_id is 'Its latest run that ended success, partial or failed.';
comment on column inventory_selections.latest_success_at is 'End of its latest successful run.';

create table inventory_items (
    tenant_id        uuid        not null,
    policy_type      text        collate "C" not null,
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
comment on column inventory_items.policy_type is 'The policy type.';
comment on column inventory_items.external_id is 'Id of the object in Graph, compared byte by byte.';
comment on column inventory_items.display_name is 'Name, if it has one; at most 1,024 characters.';
comment on column inventory_items.category is 'Category of the policy type.';
comment on column inventory_items.platform is 'Target platform, if known.';
comment on column inventory_items.meta_jsonb is 'Whitelisted properties.';
comment on column inventory_items.first_seen_at is 'Time of the first observation.';
comment on column inventory_items.last_changed_at is 'Time of the last observation that changed name, category, platform or meta.';
comment on column inventory_items.last_seen_at is 'Time of the last observation: when its page was requested, not when the row was written.';
comment on column inventory_items.last_seen_run_id is 'Run of the last observation.';

create table outbox (
    tenant_id    uuid        not null,
    run_id       uuid        not null,
    due_at       timestamptz not null,
    attempts     integer     not null default 0,
    committed_at timestamptz not null default clock_timestamp(),
    primary key (tenant_id, run_id)
) with (fillfactor = 70);
create index outbox_due on outbox (due_at);
comment on table outbox is 'Run-completed events that the broker has not confirmed. The event itself is built from the run and its types.';
comment on column outbox.tenant_id is 'The tenant.';
comment on column outbox.run_id is 'The run, whose id is the id of the event.';
comment on column outbox.due_at is 'Time from which any replica may publish it; the one that is publishing has moved it ahead.';
comment on column outbox.attempts is 'Times that it was claimed for another try.';
comment on column outbox.committed_at is 'End of the run.';

create table daemon_replicas (
    replica text        collate "C" primary key,
    seen_at timestamptz not null
);
comment on table daemon_replicas is 'Running replicas: the rate limits of Graph are divided by their number.';
comment on column daemon_replicas.replica is 'Name that the replica puts on leases.';
comment on column daemon_replicas.seen_at is 'Time of the last heartbeat.';

create table tenant_pauses (
    tenant_id    uuid        not null,
    family       text        collate "C" not null,
    paused_until timestamptz not null,
    primary key (tenant_id, family)
);
comment on table tenant_pauses is 'Pauses that Graph asked for with Retry-After, and turns at limits too low to be divided, shared by all replicas.';
comment on column tenant_pauses.tenant_id is 'The tenant.';
comment on column tenant_pauses.family is 'Throttling family: intune, devices, conditional_access or graph; with the ending _turn for the next turn of a replica.';
comment on column tenant_pauses.paused_until is 'Time until which no replica sends a request.';

-- ------------------------------------------------------------------------------------------------ run ids

create function inventory_run_id_at(in_moment timestamptz) returns uuid
    language sql immutable parallel safe
    return (lpad(to_hex(floor(extract(epoch from greatest(in_moment, 'epoch')) * 1000)::bigint), 12, '0')
            || '70008000000000000000')::uuid;
comment on function inventory_run_id_at is
    'Smallest run id of that millisecond, 1970 at the earliest: ids below it are of runs that were admitted earlier.';

create function inventory_new_run_id(in_moment timestamptz) returns uuid
    language sql volatile parallel safe
    return (lpad(to_hex(floor(extract(epoch from in_moment) * 1000)::bigint), 12, '0') || '7'
            || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid;
comment on function inventory_new_run_id is 'UUID version 7 of that moment.';

-- ---------------------------------------------------------------------------------------------- admission

create function inventory_admit(
        in_tenant_id uuid, in_idempotency_key text, in_selection_hash text, in_selection jsonb,
        in_correlation_id text, in_requested_by text, in_traceparent text,
        in_owner text, in_lease_s double precision, in_max_attempts integer,
        in_tenant_max_runs bigint, in_fleet_max_runs bigint, in_may_defer boolean, in_event_due_s double precision,
        in_daemon_version text)
    returns table (decision text, error_code text, run_id uuid, attempt integer, credential text,
                   decided_at timestamptz, started_at timestamptz, throttle_wait_ms bigint)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
    -- A session that lingers with the tenant's row locked must not hold a connection for long: the message is retried later.
    set lock_timeout = '3s'
as $$
#variable_conflict use_column
declare
    tenant         record;
    same_key       record;
    same_selection record;
    running        bigint;
    is_running     boolean;
    refusal        text;
    waits_for_disk text;
begin
    -- Each statement must see what committed while the one before it waited for a lock.
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'inventory_admit needs the isolation level read committed, not %', current_setting('transaction_isolation')
            using errcode = 'invalid_transaction_state';
    end if;

    -- Serialises the admissions of a tenant, so that its limit is exact. FOR NO KEY UPDATE suffices, and does not conflict
    -- with the foreign key checks of other statements.
    select t.enabled, t.max_concurrent_runs, t.credential into tenant
      from tenants t where t.tenant_id = in_tenant_id for no key update;
    if not found then
        decision := 'unknown_tenant';
        return next;
        return;
    end if;
    decided_at := clock_timestamp();
    credential := tenant.credential;

    -- Plain reads from here on: the row of a running run may be locked by its worker for as long as a statement lasts, and
    -- whoever waited for it here would hold up every other request of the tenant.
    select r.id, r.selection_hash, r.status, r.attempt, r.interruptions, r.lease_owner, r.lease_expires_at into same_key
      from inventory_sync_runs r
     where r.tenant_id = in_tenant_id and r.idempotency_key = in_idempotency_key;
    if found then
        run_id := same_key.id;
        if same_key.selection_hash <> in_selection_hash then
            decision := 'idempotency_conflict';
        elsif same_key.status <> 'running' then
            decision := 'duplicate';
        elsif same_key.lease_expires_at > decided_at then
            decision := case when same_key.lease_owner = in_owner then 'held_here' else 'in_progress' end;
            attempt := same_key.attempt;
        elsif same_key.lease_owner is not null and same_key.attempt - same_key.interruptions >= in_max_attempts then
            decision := 'exhausted';
        else
            -- FOR UPDATE conflicts with the FOR KEY SHARE of a batch that is still being written by the worker before: the
            -- attempt changes only when no such batch is in flight. SKIP LOCKED: then somebody is at work, come back later.
            perform from inventory_sync_runs r
              where r.tenant_id = in_tenant_id and r.id = same_key.id and r.status = 'running'
                and r.attempt = same_key.attempt and r.lease_expires_at <= decided_at
                for update skip locked;
            if not found then
                decision := 'in_progress';
            else
                update inventory_sync_runs r
                   set attempt = r.attempt + 1, interruptions = r.interruptions + (r.lease_owner is null)::integer,
                       lease_owner = in_owner, lease_expires_at = decided_at + make_interval(secs => in_lease_s),
                       republished_at = null
                 where r.tenant_id = in_tenant_id and r.id = same_key.id
                returning r.attempt, r.started_at, r.graph_throttle_wait_ms into attempt, started_at, throttle_wait_ms;
                decision := 'admitted';
            end if;
        end if;
        return next;
        return;
    end if;

    if not tenant.enabled then
        refusal := 'tenant_disabled';
        in_may_defer := false;
    else
        select count(*), coalesce(bool_or(r.selection_hash = in_selection_hash), false) into running, is_running
          from inventory_sync_runs r where r.tenant_id = in_tenant_id and r.status = 'running';
        -- A run whose lease has expired keeps its place: its own message, or a copy of it, restarts it.
        if is_running then
            select r.id, r.attempt, r.interruptions, r.lease_owner, r.lease_expires_at into same_selection from inventory_sync_runs r
             where r.tenant_id = in_tenant_id and r.selection_hash = in_selection_hash and r.status = 'running';
            -- It may have ended since.
            if found and same_selection.lease_expires_at <= decided_at and same_selection.lease_owner is not null
               and same_selection.attempt - same_selection.interruptions >= in_max_attempts then
                decision := 'exhausted';
                run_id := same_selection.id;
                return next;
                return;
            end if;
            refusal := 'lock_contended';
        else
            if running >= coalesce(tenant.max_concurrent_runs, in_tenant_max_runs) then
                refusal := 'concurrency_limit_tenant';
            elsif in_fleet_max_runs > 0 then
                -- The rows of different tenants do not serialise each other; this row does.
                perform from inventory_fleet for update;
                select count(*) into running from inventory_sync_runs r where r.status = 'running';
                if running >= in_fleet_max_runs then
                    refusal := 'concurrency_limit_global';
                end if;
            end if;
        end if;
    end if;

    error_code := refusal;
    if refusal is not null and in_may_defer then
        decision := 'deferred';
        return next;
        return;
    end if;

    decision := case when refusal is null then 'admitted' else 'skipped' end;
    run_id := inventory_new_run_id(decided_at);
    attempt := 1;
    started_at := decided_at;
    throttle_wait_ms := 0;
    insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, had_errors,
           error_codes, lease_owner, lease_expires_at, correlation_id, requested_by, traceparent, daemon_version, started_at,
           finished_at)
    values (in_tenant_id, run_id, in_idempotency_key, in_selection_hash, in_selection,
            case when refusal is null then 'running' else 'skipped' end, refusal is not null,
            case when refusal is null then '{}' else array[refusal] end,
            case when refusal is null then in_owner end,
            case when refusal is null then clock_timestamp() + make_interval(secs => in_lease_s) end,
            in_correlation_id, in_requested_by, in_traceparent, in_daemon_version, decided_at,
            case when refusal is not null then decided_at end);
    if refusal is null then
        -- The commit of a new run need not wait for the disk. Should a crash of the server undo it, then its worker finds the lease
        -- lost, and the request, which is acknowledged after the end of the run, is decided anew, with another id: nothing fences
        -- out the old worker but that its run is gone. A take-over waits, because its attempt would be given again. So does every
        -- other decision: it locks the tenant, and its commit writes all before it, so none rests on an admission that is undone.
        waits_for_disk := set_config('synchronous_commit', 'off', true);
    else
        -- As at the end of a run: this replica publishes the event itself, and others only if it does not.
        insert into outbox (tenant_id, run_id, due_at)
        values (in_tenant_id, run_id, decided_at + make_interval(secs => in_event_due_s));
    end if;
    return next;
end
$$;
comment on function inventory_admit is
    'Decides about a request: admitted, skipped, deferred, duplicate, in_progress, held_here (by in_owner), exhausted (its run or the one of its selection has used up its attempts), idempotency_conflict or unknown_tenant.';

create function inventory_admit_batch(in_requests jsonb)
    returns table (decision text, error_code text, run_id uuid, attempt integer, credential text,
                   decided_at timestamptz, started_at timestamptz, throttle_wait_ms bigint)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
    -- A tenant whose row another session has locked must not delay the others: the batch fails, and each call is executed alone.
    set lock_timeout = '100ms'
as $$
#variable_conflict use_column
declare
    request        record;
    must_wait      boolean := false;
    waits_for_disk text;
begin
    -- Here, because inventory_admit waits longer, and in one order, so that batches with common tenants do not deadlock.
    perform from tenants t
      where t.tenant_id in (select r.tenant_id from jsonb_to_recordset(in_requests) as r(tenant_id uuid))
      order by t.tenant_id for no key update;
    for request in
        select * from jsonb_to_recordset(in_requests) as r(
               tenant_id uuid, idempotency_key text, selection_hash text, selection jsonb, correlation_id text, requested_by text,
               traceparent text, owner text, lease_s double precision, max_attempts integer, tenant_max_runs bigint,
               fleet_max_runs bigint, may_defer boolean, event_due_s double precision, daemon_version text)
    loop
        select a.* into decision, error_code, run_id, attempt, credential, decided_at, started_at, throttle_wait_ms
          from inventory_admit(
               request.tenant_id, request.idempotency_key, request.selection_hash, request.selection, request.correlation_id,
               request.requested_by, request.traceparent, request.owner, request.lease_s, request.max_attempts,
               request.tenant_max_runs, request.fleet_max_runs, request.may_defer, request.event_due_s, request.daemon_version) a;
        must_wait := must_wait or decision <> 'admitted' or attempt > 1;
        return next;
    end loop;
    -- One commit for all: a new run must not take the wait for the disk from any other decision (see inventory_admit).
    if must_wait then
        waits_for_disk := set_config('synchronous_commit', 'on', true);
    end if;
end
$$;
comment on function inventory_admit_batch is
    'Decides about several requests, each as inventory_admit does, in their order.';

-- -------------------------------------------------------------------------------------------------- items

create function inventory_upsert_items(
        in_tenant_id uuid, in_run_id uuid, in_started_at timestamptz, in_policy_type text, in_category text, in_ids text[],
        in_names text[], in_platforms text[], in_metas text[], in_seen_at timestamptz[],
        out upserted bigint, out created bigint, out changed bigint)
    language plpgsql
as $$
#variable_conflict use_column
begin
    -- A row changes only if the observation is not older than the stored one: a page that was read early may be written late.
    -- Old and new are compared in their stored form, which does not parse the documents.
    with written as (
        insert into inventory_items as i (tenant_id, policy_type, external_id, display_name, category, platform, meta_jsonb,
               first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
        select in_tenant_id, in_policy_type, u.id, u.name, in_category, u.platform, u.meta::jsonb, u.seen_at, u.seen_at, u.seen_at,
               in_run_id
          from (select unnest(in_ids) as id, unnest(in_names) as name, unnest(in_platforms) as platform, unnest(in_metas) as meta,
                       unnest(in_seen_at) as seen_at) u
            on conflict (tenant_id, policy_type, external_id) do update
           set display_name = excluded.display_name, category = excluded.category, platform = excluded.platform,
               meta_jsonb = excluded.meta_jsonb, last_seen_at = excluded.last_seen_at,
               last_seen_run_id = excluded.last_seen_run_id,
               last_changed_at = case when record_image_ne(
                   row(i.display_name, i.category, i.platform, i.meta_jsonb),
                   row(excluded.display_name, excluded.category, excluded.platform, excluded.meta_jsonb))
                 then excluded.last_changed_at else i.last_changed_at end
         where excluded.last_seen_at >= i.last_seen_at
        returning first_seen_at >= in_started_at as created, last_changed_at >= in_started_at as changed)
    select count(*), count(*) filter (where w.created), count(*) filter (where w.changed and not w.created)
      into upserted, created, changed from written w;
end
$$;
comment on function inventory_upsert_items is
    'Upserts a batch of observed objects of one type; returns the rows written, created and changed. The caller holds the fence.';

create function inventory_write_items(
        in_tenant_id uuid, in_run_id uuid, in_attempt integer, in_policy_type text, in_category text, in_ids text[],
        in_names text[], in_platforms text[], in_metas text[], in_seen_at timestamptz[])
    returns table (upserted bigint, created bigint, changed bigint)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
as $$
#variable_conflict use_column
declare
    run_started_at timestamptz;
begin
    -- The fence locks the run FOR KEY SHARE: a take-over locks FOR UPDATE and waits for this batch, and a later batch finds
    -- another attempt. It does not conflict with the updates that renew the lease or record a type, which would otherwise
    -- starve while the lists of a run write without a break.
    select r.started_at into run_started_at from inventory_sync_runs r
     where r.tenant_id = in_tenant_id and r.id = in_run_id and r.attempt = in_attempt and r.status = 'running'
       for key share;
    if not found then
        return;
    end if;
    return query select * from inventory_upsert_items(in_tenant_id, in_run_id, run_started_at, in_policy_type, in_category, in_ids,
                                                      in_names, in_platforms, in_metas, in_seen_at);
end
$$;
comment on function inventory_write_items is
    'Writes a batch of observed objects of one type, each id once and in the order of the key; returns the rows written, created and changed, or no row if the lease is lost.';

-- ------------------------------------------------------------------------------------ outcomes and the end

create type inventory_run_usage as (
    graph_requests_count bigint, graph_throttled_count bigint, graph_throttle_wait_ms bigint, items_unclassified_count bigint,
    graph_select_refused_count bigint);
comment on type inventory_run_usage is 'What a run has asked of Graph since it was last recorded.';

create type inventory_run_end as (
    status text, had_errors boolean, error_codes text[], error_context jsonb, retry_after_s integer, items_observed_count bigint,
    items_upserted_count bigint, items_created_count bigint, items_changed_count bigint, errors_count bigint);
comment on type inventory_run_end is 'What the end of a run sets.';

create function inventory_insert_types(in_tenant_id uuid, in_run_id uuid, in_started_at timestamptz, in_types jsonb,
                                       in_drop_share double precision, in_drop_min_items bigint, in_policy_type text default null,
                                       in_upserted bigint default 0, in_created bigint default 0, in_changed bigint default 0)
    returns text[]
    language plpgsql
as $$
declare
    suspicious text[];
begin
    -- In the order of the key: runs of other selections list the same types, and lock the same rows in the same order. Of a
    -- repeated call the first one made the listings.
    with inserted as (
        insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
               items_upserted_count, items_created_count, items_changed_count, errors_count, error_code, failure, suspicious_drop)
        select in_tenant_id, in_run_id, o.policy_type, o.status, o.items_observed_count,
               o.items_upserted_count + case when o.policy_type = in_policy_type then in_upserted else 0 end,
               o.items_created_count + case when o.policy_type = in_policy_type then in_created else 0 end,
               o.items_changed_count + case when o.policy_type = in_policy_type then in_changed else 0 end,
               o.errors_count, o.failure ->> 'code', o.failure,
               o.status = 'complete' and exists (
                   select from inventory_complete_listings l
                    where l.tenant_id = in_tenant_id and l.policy_type = o.policy_type
                      and l.items_observed_count >= in_drop_min_items
                      and o.items_observed_count < l.items_observed_count * in_drop_share)
          from jsonb_populate_recordset(null::inventory_sync_run_types, in_types) o
         order by o.policy_type
            on conflict do nothing
        returning policy_type, status, items_observed_count, errors_count, suspicious_drop),
    listed as (
        insert into inventory_complete_listings as l (tenant_id, policy_type, started_at, items_observed_count, evidence_at)
        select in_tenant_id, t.policy_type, in_started_at, t.items_observed_count,
               case when t.errors_count = 0 and not t.suspicious_drop then in_started_at end
          from inserted t where t.status = 'complete'
            on conflict (tenant_id, policy_type) do update
           -- A run that started earlier may end later: its listing is not the latest, but it can be the latest evidence.
           set started_at = greatest(l.started_at, excluded.started_at),
               items_observed_count = case when excluded.started_at >= l.started_at
                 then excluded.items_observed_count else l.items_observed_count end,
               evidence_at = greatest(l.evidence_at, excluded.evidence_at))
    select coalesce(array_agg(t.policy_type) filter (where t.suspicious_drop), '{}') into suspicious from inserted t;
    return suspicious;
end
$$;
comment on function inventory_insert_types is
    'Inserts outcomes of types and the listings that they are evidence of; returns the types with a suspicious drop. The caller holds the fence, and has written rows of in_policy_type that its counts lack.';

create function inventory_record_types(in_tenant_id uuid, in_run_id uuid, in_attempt integer, in_usage jsonb, in_types jsonb,
                                       in_drop_share double precision, in_drop_min_items bigint)
    returns text[]
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
as $$
declare
    usage constant inventory_run_usage := jsonb_populate_record(null::inventory_run_usage, in_usage);
    run_started_at timestamptz;
begin
    -- The fence. An update locks FOR NO KEY UPDATE, which the FOR KEY SHARE of the batches of sibling lists does not block.
    update inventory_sync_runs r
       set graph_requests_count = r.graph_requests_count + usage.graph_requests_count,
           graph_throttled_count = r.graph_throttled_count + usage.graph_throttled_count,
           graph_throttle_wait_ms = r.graph_throttle_wait_ms + usage.graph_throttle_wait_ms,
           items_unclassified_count = r.items_unclassified_count + usage.items_unclassified_count,
           graph_select_refused_count = r.graph_select_refused_count + usage.graph_select_refused_count
     where r.tenant_id = in_tenant_id and r.id = in_run_id and r.attempt = in_attempt and r.status = 'running'
    returning r.started_at into run_started_at;
    if not found then
        return null;
    end if;
    return inventory_insert_types(in_tenant_id, in_run_id, run_started_at, in_types, in_drop_share, in_drop_min_items);
end
$$;
comment on function inventory_record_types is
    'Records types that have ended, and what Graph was asked since the last call; returns the types with a suspicious drop, or null if the lease is lost.';

create function inventory_end_run(
        in_tenant_id uuid, in_run_id uuid, in_attempt integer, in_policy_type text, in_category text, in_ids text[],
        in_names text[], in_platforms text[], in_metas text[], in_seen_at timestamptz[], in_usage jsonb, in_types jsonb,
        in_drop_share double precision, in_drop_min_items bigint, in_end jsonb, in_event_due_s double precision)
    returns table (suspicious text[], upserted bigint, created bigint, changed bigint)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
as $$
#variable_conflict use_column
declare
    usage        constant inventory_run_usage := jsonb_populate_record(null::inventory_run_usage, in_usage);
    ending       constant inventory_run_end := jsonb_populate_record(null::inventory_run_end, in_end);
    run_started  timestamptz;
    run_hash     text;
    written      record;
    missing_high bigint;
    missing_low  bigint;
    ended_at     timestamptz;
begin
    -- As any batch, before the run is locked FOR UPDATE: renewals of its lease must not wait for these rows.
    if in_policy_type is not null then
        select r.started_at into run_started from inventory_sync_runs r
         where r.tenant_id = in_tenant_id and r.id = in_run_id and r.attempt = in_attempt and r.status = 'running'
           for key share;
        if not found then
            return;
        end if;
        written := inventory_upsert_items(in_tenant_id, in_run_id, run_started, in_policy_type, in_category, in_ids, in_names,
                                          in_platforms, in_metas, in_seen_at);
        upserted := written.upserted;
        created := written.created;
        changed := written.changed;
    end if;
    -- The fence. FOR UPDATE conflicts with the FOR KEY SHARE of batches: whoever ends the run of a lost worker waits for a batch
    -- that is in flight, so that nothing is written after the end. The worker's own end finds no batch in flight.
    select r.started_at, r.selection_hash into run_started, run_hash from inventory_sync_runs r
     where r.tenant_id = in_tenant_id and r.id = in_run_id and r.attempt = in_attempt and r.status = 'running'
       for update;
    if not found then
        return;
    end if;
    suspicious := inventory_insert_types(in_tenant_id, in_run_id, run_started, in_types, in_drop_share, in_drop_min_items,
                                         in_policy_type, upserted, created, changed);

    -- The rows of inventory_missing_of_run, whose run has ended.
    select count(*) filter (where t.status = 'complete' and not t.suspicious_drop), count(*)
      into missing_high, missing_low
      from inventory_sync_run_types t
      join inventory_items i on i.tenant_id = t.tenant_id and i.policy_type = t.policy_type
     where t.tenant_id = in_tenant_id and t.run_id = in_run_id and i.last_seen_at < run_started;
    if ending.status <> 'success' or ending.had_errors then
        missing_high := 0;
    end if;
    missing_low := missing_low - missing_high;

    -- Never before its start, even if the clock of the server was set back meanwhile.
    ended_at := greatest(clock_timestamp(), run_started);
    update inventory_sync_runs r
       set status = ending.status, had_errors = ending.had_errors, error_codes = ending.error_codes,
           error_context = ending.error_context, retry_after_s = ending.retry_after_s,
           items_observed_count = ending.items_observed_count,
           items_upserted_count = ending.items_upserted_count + coalesce(upserted, 0),
           items_created_count = ending.items_created_count + coalesce(created, 0),
           items_changed_count = ending.items_changed_count + coalesce(changed, 0),
           errors_count = ending.errors_count,
           graph_requests_count = r.graph_requests_count + usage.graph_requests_count,
           graph_throttled_count = r.graph_throttled_count + usage.graph_throttled_count,
           graph_throttle_wait_ms = r.graph_throttle_wait_ms + usage.graph_throttle_wait_ms,
           items_unclassified_count = r.items_unclassified_count + usage.items_unclassified_count,
           graph_select_refused_count = r.graph_select_refused_count + usage.graph_select_refused_count,
           missing_high_count = missing_high, missing_low_count = missing_low,
           finished_at = ended_at
     where r.tenant_id = in_tenant_id and r.id = in_run_id;

    insert into inventory_selections as s (tenant_id, selection_hash, latest_run_id, latest_success_at)
    values (in_tenant_id, run_hash, in_run_id, case when ending.status = 'success' then ended_at end)
        on conflict (tenant_id, selection_hash) do update
       set latest_run_id = excluded.latest_run_id,
           latest_success_at = coalesce(excluded.latest_success_at, s.latest_success_at);

    -- Due in a while: the replica that ends the run publishes the event itself, and others only if it does not.
    insert into outbox (tenant_id, run_id, due_at)
    values (in_tenant_id, in_run_id, clock_timestamp() + make_interval(secs => in_event_due_s));
    return next;
end
$$;
comment on function inventory_end_run is
    'Ends a run with its last batch of objects, if in_policy_type is not null, and the types that are not recorded yet, and makes its event due; returns the types with a suspicious drop and the rows written, or no row if the lease is lost.';

create function inventory_end_batch(in_runs jsonb)
    returns table (is_ended boolean, suspicious text[], upserted bigint, created bigint, changed bigint)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
    -- As in inventory_admit_batch; it also ends a deadlock with another batch.
    set lock_timeout = '100ms'
as $$
declare
    run record;
begin
    for run in
        select * from jsonb_to_recordset(in_runs) as r(
               tenant_id uuid, run_id uuid, attempt integer, policy_type text, category text, ids text[], names text[],
               platforms text[], metas text[], seen_at timestamptz[], usage jsonb, types jsonb, drop_share double precision,
               drop_min_items bigint, ending jsonb, event_due_s double precision)
    loop
        select e.* into suspicious, upserted, created, changed
          from inventory_end_run(run.tenant_id, run.run_id, run.attempt, run.policy_type, run.category, run.ids, run.names,
                                 run.platforms, run.metas, run.seen_at, run.usage, run.types, run.drop_share, run.drop_min_items,
                                 run.ending, run.event_due_s) e;
        is_ended := found;
        return next;
    end loop;
end
$$;
comment on function inventory_end_batch is
    'Ends several runs, each as inventory_end_run does, in their order; is_ended is false where the lease is lost.';

-- ------------------------------------------------------------------------------ sweeps over all tenants
--
-- One statement each, of rows of many tenants: they are functions only because a distributed database needs other bodies. SKIP
-- LOCKED everywhere: a row may be locked for as long as a session lingers in a dead transaction, and the others must not wait
-- for it.

create function inventory_renew_leases(in_tenant_ids uuid[], in_run_ids uuid[], in_attempts integer[], in_owner text,
                                       in_lease_s double precision)
    returns table (tenant_id uuid, run_id uuid, attempt integer, left_s double precision)
    language plpgsql
    set search_path from current
    set plan_cache_mode = 'force_generic_plan'
as $$
#variable_conflict use_column
begin
    -- A row is locked for a moment when types are recorded. The batches of a run lock its row FOR KEY SHARE, which does not
    -- conflict.
    return query with free as (
        select r.tenant_id, r.id, r.lease_expires_at - clock_timestamp() as left_over
          from unnest(in_tenant_ids, in_run_ids, in_attempts) as l(tenant_id, id, attempt)
          join inventory_sync_runs r on r.tenant_id = l.tenant_id and r.id = l.id and r.attempt = l.attempt
         where r.status = 'running' and r.lease_owner = in_owner and r.lease_expires_at > clock_timestamp()
           for no key update of r skip locked)
    update inventory_sync_runs r set lease_expires_at = clock_timestamp() + make_interval(secs => in_lease_s)
      from free f where r.tenant_id = f.tenant_id and r.id = f.id
    returning r.tenant_id, r.id, r.attempt, extract(epoch from f.left_over)::double precision;
end
$$;
comment on function inventory_renew_leases is
    'Renews leases of one replica; returns those that it renewed, with the seconds that were left. A lease that has expired is not renewed, even if nobody has taken its run over.';

create function inventory_claim_due_events(in_limit bigint, in_claim_s double precision)
    returns table (tenant_id uuid, run_id uuid)
    language plpgsql
    set search_path from current
as $$
#variable_conflict use_column
begin
    -- Of replicas that poll at the same time each takes others.
    return query with due as (
        select o.tenant_id, o.run_id from outbox o where o.due_at <= clock_timestamp() order by o.due_at limit in_limit
           for update skip locked)
    update outbox o set due_at = clock_timestamp() + make_interval(secs => in_claim_s), attempts = o.attempts + 1
      from due d where o.tenant_id = d.tenant_id and o.run_id = d.run_id
    returning o.tenant_id, o.run_id;
end
$$;
comment on function inventory_claim_due_events is 'Claims events that are due for some seconds, those that are due longest first.';

create function inventory_claim_interrupted_runs(in_restart_after_s double precision, in_give_up_after_s double precision,
                                                 in_max_attempts integer, in_limit bigint)
    returns table (tenant_id uuid, run_id uuid, idempotency_key text, selection_payload jsonb, correlation_id text,
                   requested_by text, traceparent text, give_up boolean)
    language plpgsql
    set search_path from current
as $$
#variable_conflict use_column
begin
    -- The claim is the new republished_at: of several replicas at the same time one publishes. A locked row is being taken over
    -- or ended.
    return query with due as (
        select r.tenant_id, r.id,
               (r.lease_owner is not null and r.attempt - r.interruptions >= in_max_attempts)
                 or coalesce(clock_timestamp() - r.republished_at >= make_interval(secs => in_give_up_after_s), false) as give_up
          from inventory_sync_runs r
         where r.status = 'running' and clock_timestamp() - r.lease_expires_at >= make_interval(secs => in_restart_after_s)
           and ((r.lease_owner is not null and r.attempt - r.interruptions >= in_max_attempts)
                or r.republished_at is null
                or clock_timestamp() - r.republished_at >= make_interval(secs => in_give_up_after_s)
                or clock_timestamp() - r.lease_expires_at >= 2 * (r.republished_at - r.lease_expires_at))
         order by r.id limit in_limit
           for no key update skip locked)
    update inventory_sync_runs r
       set republished_at = case when d.give_up then r.republished_at else clock_timestamp() end
      from due d where r.tenant_id = d.tenant_id and r.id = d.id
    returning r.tenant_id, r.id, r.idempotency_key, r.selection_payload, r.correlation_id, r.requested_by, r.traceparent, d.give_up;
end
$$;
comment on function inventory_claim_interrupted_runs is
    'Claims runs that need the janitor: those whose lease expired a while ago and whose request is due to be published again, and those to be given up. The claim of the former is their new republished_at.';

-- ----------------------------------------------------------------------------------------------- readers

create function inventory_missing_of_run(in_tenant_id uuid, in_run_id uuid)
    returns table (policy_type text, external_id text, display_name text, last_seen_at timestamptz,
                   last_seen_run_id uuid, confidence text, type_complete boolean)
    language plpgsql stable parallel safe
    set search_path from current
as $$
#variable_conflict use_column
begin
    return query
    select i.policy_type, i.external_id, i.display_name, i.last_seen_at, i.last_seen_run_id,
           case when r.status = 'success' and not r.had_errors and t.status = 'complete' and not t.suspicious_drop
                then 'high' else 'low' end,
           t.status = 'complete'
      from inventory_sync_runs r
      join inventory_sync_run_types t on t.tenant_id = r.tenant_id and t.run_id = r.id
      join inventory_items i on i.tenant_id = t.tenant_id and i.policy_type = t.policy_type and i.last_seen_at < r.started_at
     where r.tenant_id = in_tenant_id and r.id = in_run_id and r.status in ('success', 'partial', 'failed');
end
$$;
comment on function inventory_missing_of_run is
    'Items of the types of one completed run that neither it nor any later run has observed. Confidence is high only for a successful run without errors, a complete type and no suspicious drop.';

create function inventory_missing(in_tenant_id uuid, in_selection_hash text)
    returns table (policy_type text, external_id text, display_name text, last_seen_at timestamptz,
                   last_seen_run_id uuid, confidence text, type_complete boolean)
    language plpgsql stable parallel safe
    set search_path from current
as $$
#variable_conflict use_column
declare
    run_id uuid;
begin
    select s.latest_run_id into run_id from inventory_selections s
     where s.tenant_id = in_tenant_id and s.selection_hash = in_selection_hash;
    return query select * from inventory_missing_of_run(in_tenant_id, run_id);
end
$$;
comment on function inventory_missing is
    'Items missing from a selection, relative to its latest completed run. No completed run: no rows.';

create view inventory_latest_runs with (security_invoker = true) as
    -- The keys are those of the selections: a condition on a column of r, which LIMIT shields, would read every selection.
    select s.tenant_id, s.selection_hash, r.id as run_id, r.selection_payload, r.status, r.had_errors, r.error_codes,
           r.items_observed_count, r.items_upserted_count, r.items_created_count, r.items_changed_count, r.errors_count,
           r.started_at, r.finished_at, s.latest_success_at
      from inventory_selections s
     -- One index lookup for each selection: LIMIT keeps the planner from a hash join, which would read the whole history.
     cross join lateral (select * from inventory_sync_runs r
                          where r.tenant_id = s.tenant_id and r.id = s.latest_run_id limit 1) r;
comment on view inventory_latest_runs is 'Latest completed run of every tenant and selection, and the end of its latest success.';

create view inventory_items_current with (security_invoker = true) as
    select i.tenant_id, t.display_name as tenant_name, i.policy_type, i.external_id, i.display_name, i.category, i.platform,
           i.meta_jsonb, i.first_seen_at, i.last_changed_at, i.last_seen_at, i.last_seen_run_id, p.supported as type_supported
      from inventory_items i
      join tenants t on t.tenant_id = i.tenant_id
      left join policy_types p on p.policy_type = i.policy_type
      left join inventory_complete_listings l on l.tenant_id = i.tenant_id and l.policy_type = i.policy_type
     where l.evidence_at is null or i.last_seen_at >= l.evidence_at;
comment on view inventory_items_current is
    'Items that were observed since the latest listing that is evidence of absence. type_supported is false for a type that no daemon lists any more.';
