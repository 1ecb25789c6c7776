-- Most requests meet nothing that stands in their way: they are admitted in one round trip.

create function inventory_admit_at_once(in_tenant_id uuid, in_run_id uuid, in_idempotency_key text, in_selection_hash text,
                                        in_selection jsonb, in_owner text, in_lease_s double precision, in_max_runs bigint,
                                        in_correlation_id text, in_requested_by text, in_traceparent text, in_version text)
    returns text
    language plpgsql as $$
declare
    tenant tenants;
begin
    -- Admissions of a tenant take turns. Each statement from here on sees what the one before it has committed.
    select * into tenant from tenants t where t.tenant_id = in_tenant_id for update;
    -- A run of the same key, or a running one of the same selection, is a conflict of its index.
    insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, lease_owner,
           lease_expires_at, correlation_id, requested_by, traceparent, daemon_version)
    select in_tenant_id, in_run_id, in_idempotency_key, in_selection_hash, in_selection, 'running', in_owner,
           clock_timestamp() + make_interval(secs => in_lease_s), in_correlation_id, in_requested_by, in_traceparent, in_version
     where tenant.enabled
       and (select count(*) from inventory_sync_runs r where r.tenant_id = in_tenant_id and r.status = 'running')
           < coalesce(tenant.max_concurrent_runs, in_max_runs)
        on conflict do nothing;
    return case when found then tenant.credential end;
end
$$;
comment on function inventory_admit_at_once is
    'Inserts a running run and gives the name of its credential if nothing stands in its way. Otherwise gives nothing: then it is to be found out what does.';
