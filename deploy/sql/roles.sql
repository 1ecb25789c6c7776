-- Least privilege: one role for the daemon, one for readers, and row level security between tenants. To be run once by
-- the owner of the tables or a superuser (who alone may create the roles), and again after every `inventoryd migrate`:
--
--     psql -v ON_ERROR_STOP=1 "$OWNER_URL" -f deploy/sql/roles.sql
--
-- Neither role can log in: grant them to roles that can, and put those into database.url and into your readers:
--
--     create role inventoryd_a login password '…' in role inventoryd_daemon;
--     create role reports      login password '…' in role inventoryd_reader;
--
-- A reader sees the tenant that it names in app.tenant_id, and nothing without it:
--
--     begin;
--     set local app.tenant_id = '6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d';
--     select * from inventory_items_current;
--     commit;
--
-- The setting is as good as the program that sets it: whoever may write SQL of their own may set another. The login of
-- one tenant is therefore called inventoryd_reader:<tenant id>; it sees that tenant, whatever it sets:
--
--     create role "inventoryd_reader:6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d" login password '…' in role inventoryd_reader;
--
-- Row level security applies to the owner too, unless the owner is a superuser, to whom it never applies. Nor does it apply to
-- views of a superuser without security_invoker: keep the tables and views owned by a role without that attribute.
-- deploy/README.md describes backups.

begin;
set local client_min_messages = warning;

do $$
declare
    wanted text;
begin
    foreach wanted in array array['inventoryd_daemon', 'inventoryd_reader'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            execute format('create role %I nologin', wanted);
        end if;
    end loop;
    -- No DDL, in no form: neither tables in the schema nor temporary ones.
    execute format('revoke create on schema %I from public', current_schema());
    execute format('grant usage on schema %I to inventoryd_daemon, inventoryd_reader', current_schema());
    execute format('revoke create, temporary on database %I from public', current_database());
end
$$;

-- The views read with the rights of the caller, so that the row level security of the caller applies.
alter view inventory_latest_runs set (security_invoker = true);
alter view inventory_items_current set (security_invoker = true);

revoke all on tenants, policy_types, inventory_fleet, inventory_sync_runs, inventory_sync_run_types, inventory_items,
              inventory_complete_listings, inventory_selections, outbox, daemon_replicas, tenant_pauses,
              inventory_latest_runs, inventory_items_current
    from public, inventoryd_daemon, inventoryd_reader;
revoke all on function inventory_missing, inventory_missing_of_run, inventory_run_id_at,
                       inventory_new_run_id, inventory_admit, inventory_admit_batch, inventory_write_items,
                       inventory_upsert_items, inventory_insert_types, inventory_record_types, inventory_end_run,
                       inventory_end_batch, inventory_renew_leases, inventory_claim_due_events,
                       inventory_claim_interrupted_runs,
                       inventory_oldest_migration
    from public;

-- What the daemon does and nothing else: it deletes no tenant and no item. The types of a run go with their run.
grant select, insert, update         on tenants, policy_types, inventory_items, inventory_complete_listings,
                                        inventory_selections, tenant_pauses to inventoryd_daemon;
grant select, insert, update, delete on inventory_sync_runs, outbox, daemon_replicas to inventoryd_daemon;
grant select, insert                 on inventory_sync_run_types to inventoryd_daemon;
grant select, update                 on inventory_fleet to inventoryd_daemon;
grant select on inventory_latest_runs, inventory_items_current to inventoryd_daemon;
grant execute on function inventory_missing, inventory_missing_of_run, inventory_run_id_at,
                          inventory_new_run_id, inventory_admit, inventory_admit_batch, inventory_write_items,
                          inventory_upsert_items, inventory_insert_types, inventory_record_types, inventory_end_run,
                          inventory_end_batch, inventory_renew_leases, inventory_claim_due_events,
                          inventory_claim_interrupted_runs,
                          inventory_oldest_migration
    to inventoryd_daemon;

-- Readers do not see the outbox: events are for subscribers.
grant select on tenants, policy_types, inventory_sync_runs, inventory_sync_run_types, inventory_items,
                inventory_complete_listings, inventory_selections, inventory_latest_runs, inventory_items_current
    to inventoryd_reader;
grant execute on function inventory_missing, inventory_missing_of_run to inventoryd_reader;

do $roles$
declare
    its_table     text;
    its_owner     name;
    reader_tenant text := $$case when session_user like 'inventoryd\_reader:%' then substr(session_user, 19)::uuid
                                 else nullif(current_setting('app.tenant_id', true), '')::uuid end$$;
begin
    -- In a select of its own the tenant is found out once for a statement, and not for every row. Citus has no policies with one.
    if not exists (select from pg_extension where extname = 'citus') then
        reader_tenant := format('(select %s)', reader_tenant);
    end if;
    if to_regclass('_sqlx_migrations') is not null then
        -- Every inventoryd asks first whether the schema is its own.
        execute 'revoke all on _sqlx_migrations from public';
        execute 'grant select on _sqlx_migrations to inventoryd_daemon, inventoryd_reader';
    end if;
    foreach its_table in array array['tenants', 'inventory_sync_runs', 'inventory_sync_run_types', 'inventory_items',
                                     'inventory_complete_listings', 'inventory_selections', 'outbox', 'tenant_pauses'] loop
        execute format('alter table %I enable row level security, force row level security', its_table);
        execute format('drop policy if exists inventoryd_daemon on %I', its_table);
        execute format('create policy inventoryd_daemon on %I to inventoryd_daemon using (true) with check (true)', its_table);
        execute format('drop policy if exists inventoryd_reader on %I', its_table);
        execute format('create policy inventoryd_reader on %I for select to inventoryd_reader using (tenant_id = %s)',
                       its_table, reader_tenant);
        -- The owner migrates and mends as before. Views without security_invoker read with the owner's rights too, but
        -- there current_user is the asker: one that was forgotten shows nothing instead of everything.
        select pg_get_userbyid(relowner) into its_owner from pg_class where oid = its_table::regclass;
        execute format('drop policy if exists inventoryd_owner on %I', its_table);
        execute format('create policy inventoryd_owner on %I to %I using (current_user = %L) with check (true)',
                       its_table, its_owner, its_owner);
    end loop;
end
$roles$;

commit;
