-- Splits inventory_items by a hash of the tenant. Each part has its own index, its own vacuum and its own files, and what asks
-- for one tenant touches one part: for tables that have outgrown one index in memory or one vacuum a night. To be run by the
-- owner of the tables, with all daemons stopped (they would only wait), and followed by roles.sql, because the new table has
-- neither grants nor row level security yet:
--
--     psql "$OWNER_URL" -v partitions=16 -f deploy/sql/partition_items.sql
--     psql "$OWNER_URL" -v ON_ERROR_STOP=1 -f deploy/sql/roles.sql
--
-- It copies every row, in one transaction, and needs disk space for the copy; the views and functions stay as they are. Run again
-- with another number of partitions it splits anew.
\set ON_ERROR_STOP on
\if :{?partitions} \else \set partitions 16 \endif

begin;
lock table inventory_items in access exclusive mode;
select set_config('inventoryd.partitions', :'partitions', true) \g /dev/null
-- A view keeps its table by its identity, whatever its name: it is created again from its text.
select pg_get_viewdef('inventory_items_current'::regclass) as current_items \gset

alter table inventory_items rename to inventory_items_before;
alter table inventory_items_before rename constraint inventory_items_pkey to inventory_items_before_pkey;
create table inventory_items (
    like inventory_items_before including comments,
    constraint inventory_items_pkey primary key (tenant_id, policy_type, external_id)
) partition by hash (tenant_id);
comment on table inventory_items is 'Objects as last observed. Nothing is ever deleted here: what is missing is derived.';

do $$
declare
    parts constant integer := current_setting('inventoryd.partitions')::integer;
begin
    for part in 0 .. parts - 1 loop
        -- The free space of the unpartitioned table: without it no update is heap-only.
        execute format(
            'create table inventory_items_%s_of_%s partition of inventory_items for values with (modulus %s, remainder %s)
               with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05)', part + 1, parts, parts, part);
    end loop;
end
$$;

insert into inventory_items select * from inventory_items_before;
create or replace view inventory_items_current with (security_invoker = true) as :current_items
drop table inventory_items_before;
commit;
analyze inventory_items;
