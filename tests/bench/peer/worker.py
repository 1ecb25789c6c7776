"""Peer of the benchmark: the daemon's work done by a small Celery worker.

Tasks come from a quorum queue and are acknowledged late, commits are durable, and the event stays in an outbox until the
broker has confirmed it. It has no lease, no fence, and no protection against throttling or endless lists; an event
that a crash leaves in the outbox is published by nobody.
"""

import json
import os

import psycopg
import requests
from celery import Celery
from kombu import Exchange, Queue

LISTS = {entry["policy_type"]: entry for entry in json.load(open(os.environ["PEER_LISTS"], encoding="utf-8"))}
GRAPH, DATABASE = os.environ["PEER_GRAPH"], os.environ["PEER_DATABASE"]
CLIENT_ID, CLIENT_SECRET = os.environ["PEER_CLIENT_ID"], os.environ["PEER_CLIENT_SECRET"]
QUEUE, EVENTS = os.environ["PEER_QUEUE"], os.environ["PEER_EVENTS"]
BATCH = 500

app = Celery("peer", broker=os.environ["PEER_BROKER"])
app.conf.update(
    task_queues=[Queue(QUEUE, Exchange(""), routing_key=QUEUE, durable=True, queue_arguments={"x-queue-type": "quorum"})],
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=8,
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    worker_send_task_events=False,
)

state = {"tokens": {}}


def session():
    if "session" not in state:
        state["session"] = requests.Session()
        state["session"].verify = os.environ["PEER_CA"]
        state["database"] = psycopg.connect(DATABASE)
    return state["session"], state["database"]


def token(http, tenant):
    if tenant not in state["tokens"]:
        form = {"grant_type": "client_credentials", "client_id": CLIENT_ID, "client_secret": CLIENT_SECRET,
                "scope": GRAPH + "/.default"}
        answer = http.post(f"{GRAPH}/{tenant}/oauth2/v2.0/token", data=form, timeout=60)
        answer.raise_for_status()
        state["tokens"][tenant] = "Bearer " + answer.json()["access_token"]
    return state["tokens"][tenant]


UPSERT = """
insert into inventory_items as i (tenant_id, policy_type, external_id, display_name, category, platform, meta_jsonb,
       first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
select %s, %s, u.id, u.name, %s, null, u.meta::jsonb, now(), now(), now(), %s
  from unnest(%s::text[], %s::text[], %s::text[]) u(id, name, meta)
on conflict (tenant_id, policy_type, external_id) do update set
  display_name = excluded.display_name, meta_jsonb = excluded.meta_jsonb, last_seen_at = excluded.last_seen_at,
  last_seen_run_id = excluded.last_seen_run_id,
  last_changed_at = case when (i.display_name, i.meta_jsonb) is distinct from (excluded.display_name, excluded.meta_jsonb)
                         then excluded.last_changed_at else i.last_changed_at end
"""


def write(database, tenant, run, entry, rows):
    ids, names, metas = zip(*rows)
    database.execute(UPSERT, (tenant, entry["policy_type"], entry["category"], run, list(ids), list(names), list(metas)))
    database.commit()


def copy(http, database, tenant, run, entry):
    link, pending, count = f"{GRAPH}/{entry['link']}", {}, 0
    while link:
        headers = {"authorization": token(http, tenant), "prefer": "include-unknown-enum-members"}
        answer = http.get(link, headers=headers, timeout=60)
        answer.raise_for_status()
        page = answer.json()
        for item in page["value"]:
            meta = {key: item[key] for key in entry["meta"] if item.get(key) is not None}
            pending[item["id"]] = (item["id"], item.get(entry["name"]), json.dumps(meta))
            count += 1
        link = page.get("@odata.nextLink")
        if len(pending) >= BATCH:
            write(database, tenant, run, entry, list(pending.values()))
            pending = {}
    if pending:
        write(database, tenant, run, entry, list(pending.values()))
    return count


@app.task(name="peer.sync")
def sync(tenant, run, key, selection_hash, policy_types):
    http, database = session()
    database.execute(
        "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,"
        " lease_owner, lease_expires_at, daemon_version) values (%s, %s, %s, %s, '{}', 'running', 'peer',"
        " now() + interval '1 hour', 'peer')", (tenant, run, key, selection_hash))
    database.commit()
    count = sum(copy(http, database, tenant, run, LISTS[policy_type]) for policy_type in policy_types)
    event = json.dumps({"id": run, "data": {"tenant_id": tenant, "status": "success", "items": count}, "pad": "x" * 1300})
    database.execute(
        "update inventory_sync_runs set status = 'success', items_observed_count = %s, finished_at = clock_timestamp()"
        " where tenant_id = %s and id = %s", (count, tenant, run))
    # Not due for as long as the daemon under comparison polls the same outbox.
    database.execute("insert into outbox (tenant_id, run_id, due_at) values (%s, %s, now() + interval '1 day')", (tenant, run))
    database.commit()
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(event, exchange=EVENTS, routing_key=f"run.completed.success.{tenant}", delivery_mode=2,
                         content_type="application/json", content_encoding="utf-8")
    database.execute("delete from outbox where tenant_id = %s and run_id = %s", (tenant, run))
    database.commit()
