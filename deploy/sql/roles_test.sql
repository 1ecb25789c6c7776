-- Holds what roles.sql promises. For a superuser, in an empty database of a server that is only for tests and lets
-- everybody in without a password:
--
--     cat migrations/*.sql >all.sql && psql -v ON_ERROR_STOP=1 -v migrations="$PWD/all.sql" "$URL" -f deploy/sql/roles_test.sql
--
-- Each check raises an exception if it does not hold.
\set QUIET on
\set ON_ERROR_STOP on
\set superuser :USER
set client_min_messages = warning;

create role roles_test_owner nologin;
grant all on schema public to roles_test_owner;
alter schema public owner to roles_test_owner;
do $$ begin execute format('alter database %I owner to roles_test_owner', current_database()); end $$;
set role roles_test_owner;
\i :migrations
create table policy_versions (tenant_id uuid, version int);
create table _sqlx_migrations (version bigint, success boolean);
reset role;
\ir roles.sql
create role roles_test_daemon login in role inventoryd_daemon;
create role roles_test_reader login in role inventoryd_reader;
create role "inventoryd_reader:aaaaaaaa-0000-4000-8000-000000000001" login in role inventoryd_reader;
-- Again, and by the owner: it changes nothing, and needs no right to create roles.
set role roles_test_owner;
\ir roles.sql
insert into policy_versions values ('aaaaaaaa-0000-4000-8000-000000000001', 1);
-- What somebody could add one day without a thought.
create view forgetful as select * from inventory_items;
grant select on forgetful to inventoryd_reader;
reset role;

create function refused(statement text) returns void language plpgsql as $$
begin
    execute statement;
    raise exception 'was not refused: %', statement;
exception
    when insufficient_privilege then null;
end
$$;
create function equal(wanted anyelement, got anyelement, what text) returns void language plpgsql as $$
begin
    if wanted is distinct from got then
        raise exception '%: % instead of %', what, got, wanted;
    end if;
end
$$;
-- Rows of a tenant in everything that the role may read and that has tenants.
create function visible(tenant uuid) returns text language plpgsql as $$
declare
    relation regclass;
    here bigint;
    found text[] := '{}';
begin
    for relation in
        select c.oid from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id'
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v')
           and has_table_privilege(c.oid, 'select') order by c.relname
    loop
        execute format('select count(*) from %s where tenant_id = %L', relation, tenant) into here;
        found := found || format('%s=%s', relation, here);
    end loop;
    return array_to_string(found, ' ');
end
$$;

-- The daemon works, with the statements that it has.
\connect - roles_test_daemon
insert into tenants (tenant_id, display_name) values
    ('aaaaaaaa-0000-4000-8000-000000000001', 'A'), ('bbbbbbbb-0000-4000-8000-000000000002', 'B')
    on conflict (tenant_id) do update set display_name = excluded.display_name;
\set usage '{"graph_requests_count": 0, "graph_throttled_count": 0, "graph_throttle_wait_ms": 0, "items_unclassified_count": 0, "graph_select_refused_count": 0}'
\set request '{"tenant_id": "aaaaaaaa-0000-4000-8000-000000000001", "idempotency_key": "first", "selection_hash": "hash", "selection": {}, "owner": "here", "lease_s": 60, "max_attempts": 5, "tenant_max_runs": 2, "fleet_max_runs": 0, "may_defer": false, "event_due_s": 60, "daemon_version": "0"}'
begin;
select tenant_id from tenants where tenant_id = 'aaaaaaaa-0000-4000-8000-000000000001' for update \g /dev/null
select only_row from inventory_fleet for update \g /dev/null
select equal('admitted default', (select decision || ' ' || credential from inventory_admit('aaaaaaaa-0000-4000-8000-000000000001',
             'first', 'hash', '{}', null, null, null, 'here', 60, 5, 2, 0, false, 60, '0')), 'a request is admitted') \g /dev/null
select equal('1 1 0', (select concat_ws(' ', upserted, created, changed) from inventory_write_items('aaaaaaaa-0000-4000-8000-000000000001',
             id, 1, 'type', 'category', '{id}', '{name}', '{null}', '{"{}"}', array[clock_timestamp()])), 'a batch is written')
  from inventory_sync_runs \g /dev/null
select equal(1::bigint, (select count(*) from inventory_renew_leases(array[tenant_id], array[id], array[1], 'here', 60)), 'a lease is renewed')
  from inventory_sync_runs \g /dev/null
select equal('{}', inventory_record_types(tenant_id, id, 1, :'usage', '[{"policy_type": "type", "status": "complete",
             "items_observed_count": 0, "items_upserted_count": 0, "items_created_count": 0, "items_changed_count": 0,
             "errors_count": 0}]', 0.5, 20)::text, 'a type is recorded') from inventory_sync_runs \g /dev/null
select equal('{} 1', (select concat_ws(' ', suspicious, upserted) from inventory_end_run(tenant_id, id, 1, 'type', 'category', '{id}', '{name}',
             '{null}', '{"{}"}', array[clock_timestamp()], :'usage', '[]', 0.5, 20, '{"status": "success", "had_errors": false,
             "error_codes": [], "error_context": {}, "items_observed_count": 0, "items_upserted_count": 0,
             "items_created_count": 0, "items_changed_count": 0, "errors_count": 0}', 0)), 'a run is ended')
  from inventory_sync_runs \g /dev/null
select equal('admitted duplicate', (select string_agg(decision, ' ') from inventory_admit_batch(jsonb_build_array(
             :'request'::jsonb || '{"idempotency_key": "second"}', :'request'::jsonb))), 'a batch is admitted') \g /dev/null
select equal(0::bigint, (select count(*) from inventory_end_batch('[]')), 'a batch is ended') \g /dev/null
select equal(1::bigint, count(*), 'an event is claimed') from inventory_claim_due_events(10, 60) \g /dev/null
select equal(0::bigint, count(*), 'interrupted runs') from inventory_claim_interrupted_runs(60, 3600, 5, 10) \g /dev/null
rollback;
insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, lease_owner,
        lease_expires_at, daemon_version, started_at)
    select tenant_id, gen_random_uuid(), 'key', 'hash', '{}', 'running', 'here', now() + interval '1 minute', '0', now()
      from tenants;
insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count, items_upserted_count,
        items_created_count, items_changed_count, errors_count)
    select tenant_id, id, 'type', 'complete', 1, 1, 1, 0, 0 from inventory_sync_runs;
insert into inventory_items (tenant_id, policy_type, external_id, category, meta_jsonb, first_seen_at, last_changed_at,
        last_seen_at, last_seen_run_id)
    select tenant_id, 'type', id, 'category', '{}', now() - age, now() - age, now() - age, gen_random_uuid()
      from tenants, (values ('now', interval '0'), ('gone', interval '1 day')) ages(id, age)
    on conflict (tenant_id, policy_type, external_id) do update set last_seen_at = excluded.last_seen_at;
insert into inventory_items select * from inventory_items
    on conflict (tenant_id, policy_type, external_id) do update set last_changed_at = excluded.last_changed_at;
update inventory_sync_runs set status = 'success', finished_at = clock_timestamp();
insert into inventory_selections select tenant_id, selection_hash, id, finished_at from inventory_sync_runs;
insert into inventory_complete_listings select tenant_id, 'type', started_at, 1, started_at from inventory_sync_runs;
insert into outbox (tenant_id, run_id, due_at) select tenant_id, id, now() from inventory_sync_runs;
with due as (select tenant_id, run_id from outbox where due_at <= clock_timestamp() for update skip locked)
update outbox o set due_at = now() from due where o.tenant_id = due.tenant_id and o.run_id = due.run_id;
insert into daemon_replicas values ('here', now()) on conflict (replica) do update set seen_at = excluded.seen_at;
delete from daemon_replicas where replica = 'elsewhere';
insert into tenant_pauses as p select tenant_id, 'intune', now() from tenants
    on conflict (tenant_id, family) do update set paused_until = excluded.paused_until where p.paused_until < excluded.paused_until;
select equal('inventory_complete_listings=1 inventory_items=2 inventory_items_current=1 inventory_latest_runs=1 '
             'inventory_selections=1 inventory_sync_run_types=1 inventory_sync_runs=1 outbox=1 tenant_pauses=1 tenants=1', visible('bbbbbbbb-0000-4000-8000-000000000002'),
             'what the daemon sees of a tenant') \g /dev/null
select equal(1::bigint, count(*), 'missing, for the daemon')
  from inventory_missing('bbbbbbbb-0000-4000-8000-000000000002', 'hash') \g /dev/null
select max(version) from _sqlx_migrations where success \g /dev/null
-- It deletes old runs, with their types, and sent events.
begin;
delete from outbox;
delete from inventory_sync_runs;
select equal(0::bigint, count(*), 'types of deleted runs') from inventory_sync_run_types \g /dev/null
rollback;
-- And nothing else.
select refused(statement) from unnest(array[
    'create table mine ()', 'create temporary table mine ()', 'create schema mine', 'create function mine() returns int language sql as ''select 1''',
    'create index on inventory_items (category)', 'alter table inventory_items add mine int', 'drop table inventory_items',
    'truncate inventory_items', 'alter table inventory_items disable row level security', 'delete from inventory_items', 'delete from tenants',
    'delete from inventory_sync_run_types', 'insert into inventory_fleet values (true)', 'update _sqlx_migrations set success = false',
    'select from policy_versions', 'insert into policy_versions values (null, 2)', 'update policy_versions set version = 2',
    'delete from policy_versions', 'drop view inventory_latest_runs', 'create role mine', 'set role roles_test_owner']) statement \g /dev/null
\connect - :superuser

-- A reader without a tenant sees nothing.
create function sees_nothing(who text) returns void language sql as $$
    select equal('forgetful=0 inventory_complete_listings=0 inventory_items=0 inventory_items_current=0 '
                 'inventory_latest_runs=0 inventory_selections=0 inventory_sync_run_types=0 '
                 'inventory_sync_runs=0 tenants=0', visible(tenant), who || ' sees of ' || tenant)
      from unnest(array['aaaaaaaa-0000-4000-8000-000000000001', 'bbbbbbbb-0000-4000-8000-000000000002']::uuid[]) tenant
$$;
create function sees_only_a(who text) returns void language plpgsql as $$
declare
    run uuid := (select id from inventory_sync_runs);
begin
    perform equal('forgetful=0 inventory_complete_listings=1 inventory_items=2 inventory_items_current=1 '
                 'inventory_latest_runs=1 inventory_selections=1 inventory_sync_run_types=1 '
                  'inventory_sync_runs=1 tenants=1', visible('aaaaaaaa-0000-4000-8000-000000000001'), who || ' sees of A');
    perform equal('forgetful=0 inventory_complete_listings=0 inventory_items=0 inventory_items_current=0 '
                 'inventory_latest_runs=0 inventory_selections=0 inventory_sync_run_types=0 '
                  'inventory_sync_runs=0 tenants=0', visible('bbbbbbbb-0000-4000-8000-000000000002'), who || ' sees of B');
    perform equal('gone', string_agg(external_id, ' '), who || ', missing of A')
       from inventory_missing('aaaaaaaa-0000-4000-8000-000000000001', 'hash');
    perform equal(1::bigint, count(*), who || ', missing of the run of A')
       from inventory_missing_of_run('aaaaaaaa-0000-4000-8000-000000000001', run);
    perform equal(0::bigint, count(*), who || ', missing of B')
       from inventory_missing('bbbbbbbb-0000-4000-8000-000000000002', 'hash');
end
$$;
select equal(0::bigint, count(*), 'tables of tenants without forced row level security')
  from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id'
 where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname <> 'policy_versions'
   and not (c.relrowsecurity and c.relforcerowsecurity) \g /dev/null
select equal(0::bigint, count(*), 'tables that roles.sql does not know')
  from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname <> 'policy_versions'
   and not has_table_privilege('inventoryd_daemon', c.oid, 'select') \g /dev/null
create table run_of_b as select id from inventory_sync_runs where tenant_id = 'bbbbbbbb-0000-4000-8000-000000000002';
grant select on run_of_b to public;

\connect - roles_test_reader
select sees_nothing('a reader without a tenant') \g /dev/null
set app.tenant_id = '';
select sees_nothing('a reader with an empty tenant') \g /dev/null
begin;
set local app.tenant_id = 'aaaaaaaa-0000-4000-8000-000000000001';
select sees_only_a('a reader of A') \g /dev/null
select equal(0::bigint, count(*), 'a reader of A, missing of the run of B')
  from run_of_b, inventory_missing_of_run('bbbbbbbb-0000-4000-8000-000000000002', run_of_b.id) \g /dev/null
commit;
select sees_nothing('a reader after its transaction') \g /dev/null
set app.tenant_id = 'aaaaaaaa-0000-4000-8000-000000000001';
set row_security = off;
select refused('select * from inventory_items') \g /dev/null
set row_security = on;
select refused(statement) from unnest(array[
    'create table mine ()', 'create temporary table mine ()', 'insert into tenants (tenant_id, display_name) values (gen_random_uuid(), ''C'')',
    'update inventory_items set category = ''x''', 'delete from inventory_items', 'select from inventory_items for update',
    'select from outbox', 'select from inventory_fleet', 'select from tenant_pauses', 'select from daemon_replicas', 'select from policy_versions', 'truncate inventory_items',
    'set role inventoryd_daemon', 'set session authorization roles_test_daemon']) statement \g /dev/null
\connect - :superuser

-- The login of one tenant sees that one, whatever it sets.
\connect - "inventoryd_reader:aaaaaaaa-0000-4000-8000-000000000001"
set app.tenant_id = '';
select sees_only_a('the login of A') \g /dev/null
set app.tenant_id = 'bbbbbbbb-0000-4000-8000-000000000002';
select sees_only_a('the login of A that asks for B') \g /dev/null
\connect - :superuser

-- The owner sees and migrates everything.
set role roles_test_owner;
select equal(4::bigint, count(*), 'items, for the owner') from inventory_items \g /dev/null
update inventory_items set category = 'other';
select equal(4::bigint, count(*), 'items that the owner changed') from inventory_items where category = 'other' \g /dev/null
reset role;

-- The same where a superuser owns everything: the views must not lend a reader its rights.
do $$
declare
    relation regclass;
begin
    for relation in select oid from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') loop
        execute format('alter table %s owner to %I', relation, current_user);
    end loop;
end
$$;
-- A view without security_invoker would, as the header of roles.sql says: no view of the schema is one.
select equal(0::bigint, count(*), 'views that read with the rights of their owner')
  from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind = 'v' and c.relname <> 'forgetful'
   and not 'security_invoker=true' = any(coalesce(c.reloptions, '{}')) \g /dev/null
drop view forgetful;
-- Empty; it stands for the dropped one in what the two functions expect.
create view forgetful as select * from inventory_items where false;
grant select on forgetful to inventoryd_reader;
\connect - roles_test_reader
select sees_nothing('a reader of tables of a superuser') \g /dev/null
set app.tenant_id = 'aaaaaaaa-0000-4000-8000-000000000001';
select sees_only_a('a reader of A in tables of a superuser') \g /dev/null
\connect - :superuser
\echo roles hold
