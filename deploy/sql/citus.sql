-- Distributes the schema by tenant over the nodes of a Citus cluster: every row of a tenant lies on one node, and a run is written
-- there. To be run on the coordinator by the owner of the tables, once, with all daemons stopped, after `inventoryd migrate` (and
-- partition_items.sql, if wanted) and before roles.sql:
--
--     psql "$OWNER_URL" -f deploy/sql/citus.sql
--     psql "$OWNER_URL" -v ON_ERROR_STOP=1 -f deploy/sql/roles.sql
--
-- citus.shard_count decides how many shards there are, and so over how many nodes the tenants can be spread.
\set ON_ERROR_STOP on
set client_min_messages = warning;

begin;
set local citus.multi_shard_modify_mode = 'sequential';
-- Citus distributes a table together with its views, which is impossible while they read tables that are not distributed yet: both
-- views are created again from their text.
create temporary table views on commit drop as
select name, format('create view %I with (security_invoker = true) as %s', name, pg_get_viewdef(name::regclass)) as definition,
       obj_description(name::regclass, 'pg_class') as comment
  from unnest(array['inventory_latest_runs', 'inventory_items_current']) name;
drop view inventory_latest_runs, inventory_items_current;

select create_distributed_table('tenants', 'tenant_id', colocate_with => 'none') \g /dev/null
select create_distributed_table(name, 'tenant_id', colocate_with => 'tenants')
  from unnest(array['inventory_sync_runs', 'inventory_sync_run_types', 'inventory_items', 'inventory_complete_listings',
                    'inventory_selections', 'outbox', 'tenant_pauses']) name \g /dev/null
-- Whole on every node: a view joins the first, and an admission locks the row of the second. daemon_replicas stays a table of the
-- coordinator.
select create_reference_table('policy_types'), create_reference_table('inventory_fleet') \g /dev/null

select definition from views \gexec
select format('comment on view %I is %L', name, comment) from views \gexec

-- The sweeps, because no statement can lock rows of several shards. Candidates of all tenants are read without locks; then each row
-- is locked and changed by its tenant and id, if it is still as it was read. SKIP LOCKED everywhere: a row may be locked for as
-- long as a session lingers in a dead transaction, and the others must not wait for it.

create or replace function inventory_renew_leases(in_tenant_ids uuid[], in_run_ids uuid[], in_attempts integer[], in_owner text,
                                       in_lease_s double precision)
    returns table (tenant_id uuid, run_id uuid, attempt integer, left_s double precision)
    language plpgsql
    set search_path from current
as $$
#variable_conflict use_column
declare
    checked_at timestamptz;
begin
    for tenant_id, run_id, attempt in select * from unnest(in_tenant_ids, in_run_ids, in_attempts) loop
        checked_at := clock_timestamp();
        -- The batches of a run lock its row FOR KEY SHARE, which does not conflict.
        select extract(epoch from r.lease_expires_at - checked_at) into left_s from inventory_sync_runs r
         where r.tenant_id = inventory_renew_leases.tenant_id and r.id = inventory_renew_leases.run_id
           and r.attempt = inventory_renew_leases.attempt and r.status = 'running' and r.lease_owner = in_owner
           and r.lease_expires_at > checked_at
           for no key update skip locked;
        if found then
            update inventory_sync_runs r set lease_expires_at = checked_at + make_interval(secs => in_lease_s)
             where r.tenant_id = inventory_renew_leases.tenant_id and r.id = inventory_renew_leases.run_id;
            return next;
        end if;
    end loop;
end
$$;

create or replace function inventory_claim_due_events(in_limit bigint, in_claim_s double precision)
    returns table (tenant_id uuid, run_id uuid)
    language plpgsql
    set search_path from current
as $$
#variable_conflict use_column
declare
    checked_at constant timestamptz := clock_timestamp();
begin
    for tenant_id, run_id in
        select o.tenant_id, o.run_id from outbox o where o.due_at <= checked_at order by o.due_at limit in_limit
    loop
        perform from outbox o
          where o.tenant_id = inventory_claim_due_events.tenant_id and o.run_id = inventory_claim_due_events.run_id
            and o.due_at <= checked_at
            for update skip locked;
        if found then
            update outbox o set due_at = checked_at + make_interval(secs => in_claim_s), attempts = o.attempts + 1
             where o.tenant_id = inventory_claim_due_events.tenant_id and o.run_id = inventory_claim_due_events.run_id;
            return next;
        end if;
    end loop;
end
$$;

create or replace function inventory_claim_interrupted_runs(in_restart_after_s double precision, in_give_up_after_s double precision,
                                                 in_max_attempts integer, in_limit bigint)
    returns table (tenant_id uuid, run_id uuid, idempotency_key text, selection_payload jsonb, correlation_id text,
                   requested_by text, traceparent text, give_up boolean)
    language plpgsql
    set search_path from current
as $$
#variable_conflict use_column
declare
    checked_at constant timestamptz := clock_timestamp();
    run        record;
begin
    for run in
        select r.tenant_id, r.id, r.idempotency_key, r.selection_payload, r.correlation_id, r.requested_by, r.traceparent,
               r.lease_expires_at, r.republished_at,
               (r.lease_owner is not null and r.attempt - r.interruptions >= in_max_attempts)
                 or coalesce(checked_at - r.republished_at >= make_interval(secs => in_give_up_after_s), false) as give_up
          from inventory_sync_runs r
         where r.status = 'running' and checked_at - r.lease_expires_at >= make_interval(secs => in_restart_after_s)
           and ((r.lease_owner is not null and r.attempt - r.interruptions >= in_max_attempts)
                or r.republished_at is null
                or checked_at - r.republished_at >= make_interval(secs => in_give_up_after_s)
                or checked_at - r.lease_expires_at >= 2 * (r.republished_at - r.lease_expires_at))
         order by r.id limit in_limit
    loop
        -- A locked row is being taken over or ended, or another replica claims it.
        perform from inventory_sync_runs r
          where r.tenant_id = run.tenant_id and r.id = run.id and r.status = 'running'
            and r.lease_expires_at = run.lease_expires_at and r.republished_at is not distinct from run.republished_at
            for no key update skip locked;
        continue when not found;
        if not run.give_up then
            update inventory_sync_runs r set republished_at = checked_at where r.tenant_id = run.tenant_id and r.id = run.id;
        end if;
        tenant_id := run.tenant_id;
        run_id := run.id;
        idempotency_key := run.idempotency_key;
        selection_payload := run.selection_payload;
        correlation_id := run.correlation_id;
        requested_by := run.requested_by;
        traceparent := run.traceparent;
        give_up := run.give_up;
        return next;
    end loop;
end
$$;

-- A statement for several tenants cannot be handed to the node of one: the daemon executes each call alone.
create or replace function inventory_admit_batch(in_requests jsonb)
    returns table (decision text, error_code text, run_id uuid, attempt integer, credential text,
                   decided_at timestamptz, started_at timestamptz, throttle_wait_ms bigint)
    language plpgsql
as $$
begin
    raise exception 'the tenants lie on several nodes' using errcode = 'feature_not_supported';
end
$$;

create or replace function inventory_end_batch(in_runs jsonb)
    returns table (is_ended boolean, suspicious text[], upserted bigint, created bigint, changed bigint)
    language plpgsql
as $$
begin
    raise exception 'the tenants lie on several nodes' using errcode = 'feature_not_supported';
end
$$;

-- Citus plans an insert of a query, and any statement on several shards, only with the values of its parameters.
select format('alter function %s set plan_cache_mode = auto', oid::regprocedure)
  from pg_proc where pronamespace = current_schema()::regnamespace and proconfig @> '{plan_cache_mode=force_generic_plan}' \gexec
-- The coordinator hands the calls of these functions whole to the node of the tenant.
select create_distributed_function(oid::regprocedure, 'in_tenant_id', colocate_with => 'tenants')
  from pg_proc where pronamespace = current_schema()::regnamespace
   and proname in ('inventory_admit', 'inventory_write_items', 'inventory_record_types', 'inventory_end_run', 'inventory_missing',
                   'inventory_missing_of_run') \g /dev/null
commit;
