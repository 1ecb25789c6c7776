# shellcheck shell=bash
# Tour of `deploy/dev demo`, sourced by deploy/dev: three tenants, eight requests and their results.

readonly CONTOSO=c0170500-0000-4000-8000-000000000001
readonly FABRIKAM=fab21ca0-0000-4000-8000-000000000002
readonly TAILSPIN=7a115219-0000-4000-8000-000000000003
readonly FIRST_TYPES=deviceCompliancePolicy,settingsCatalogPolicy
readonly OTHER_TYPES=deviceConfiguration

tour() {
  "$INSTANCE" packages curl
  mkdir -p "$DEV/log"
  # A new simulator process has its initial objects again, which an earlier tour may have deleted.
  halt graph-sim "$SIM"
  local stamp events
  stamp=$(date +%H%M%S)
  events=$DEV/demo-events.txt
  up

  head_line 'Tenants'
  {
    cli tenant add "$CONTOSO" --name Contoso --max-runs 1
    cli tenant add "$FABRIKAM" --name Fabrikam
    cli tenant add "$TAILSPIN" --name Tailspin
  } | sed 's/^/  /'

  head_line 'Requests'
  graph_rules
  subscribe "$events"
  ask "$CONTOSO" "$stamp-clean" 'Contoso    two types and the foundations' --types "$FIRST_TYPES"
  ask "$FABRIKAM" "$stamp-throttled" 'Fabrikam   the same; Graph responds twice with 429, Retry-After 2 s' --types "$FIRST_TYPES"
  ask "$TAILSPIN" "$stamp-forbidden" 'Tailspin   the same and apps, which Graph forbids' --types "$FIRST_TYPES,mobileApp"
  settle
  ask "$FABRIKAM" "$stamp-licence" 'Fabrikam   all scripts; the tenant has no licence for remediations' --category Scripts --no-foundations
  ask "$CONTOSO" "$stamp-clean" 'Contoso    the first key again: a duplicate' --types "$FIRST_TYPES"
  settle
  ask "$CONTOSO" "$stamp-slow" 'Contoso    another selection; Graph is slow' --types "$OTHER_TYPES"
  until_running "$CONTOSO"
  ask "$CONTOSO" "$stamp-over" 'Contoso    a concurrent request, above the limit of one run' --types "$FIRST_TYPES"
  settle
  say '  -          an invalid request: tenant_id is not a GUID'
  malformed "$stamp"

  say '  (Contoso deletes two compliance policies and an assignment filter)'
  gone deviceCompliancePolicies 2
  gone deviceCompliancePolicies 3
  gone assignmentFilters 2
  ask "$CONTOSO" "$stamp-again" 'Contoso    the first selection again' --types "$FIRST_TYPES"
  settle

  head_line 'Runs: inventoryd runs list'
  cli runs list --limit 7
  head_line 'Events: inventoryd events tail'
  show_events "$events" 7
  head_line 'Scripts of Fabrikam: inventoryd runs show'
  cli runs show "$(latest_run "$FABRIKAM")"
  head_line 'Missing at Contoso: inventoryd missing'
  cli missing --tenant "$CONTOSO" --types "$FIRST_TYPES"
  head_line 'Dead letters: inventoryd dead list'
  cli dead list

  head_line 'Still running'
  local servers=', PostgreSQL, RabbitMQ'
  [[ -z $OWN_DATABASE ]] || servers=${servers/, PostgreSQL/}
  [[ -z $OWN_AMQP ]] || servers=${servers/, RabbitMQ/}
  say "  two replicas, the simulator$servers:  deploy/dev status | logs | psql"
  say "  Any command of inventoryd:  deploy/dev run runs list --tenant $CONTOSO"
  say '  Stop:  deploy/dev down      Stop and delete the data:  deploy/dev clean'
}

head_line() {
  if [[ -t 1 ]]; then printf '\n\e[1m%s\e[0m\n' "$1"; else printf '\n%s\n' "$1"; fi
}

cli() { "$BIN" "$@"; }

# Calls the administration API of the simulator.
admin() { # METHOD PATH [JSON]
  curl -sS --fail-with-body --max-time 10 --cacert "$DEV/graph-ca.pem" -X "$1" "https://127.0.0.1:$SIM_PORT/admin/$2" \
    ${3:+-H 'content-type: application/json' -d "$3"} >"$DEV/log/admin.log" ||
    die "the simulator refused $1 /admin/$2: $(cat "$DEV/log/admin.log")"
}

gone() { # COLLECTION INDEX
  admin POST objects/delete "{\"tenant\":\"$CONTOSO\",\"collection\":\"beta/deviceManagement/$1\",\"index\":$2}"
}

graph_rules() {
  admin DELETE rules
  admin POST rules "[
    {\"tenant\":\"$FABRIKAM\",\"path\":\"deviceManagement/deviceCompliancePolicies\",\"times\":2,
     \"action\":{\"kind\":\"status\",\"status\":429,\"retry_after\":\"2\"}},
    {\"tenant\":\"$FABRIKAM\",\"path\":\"deviceManagement/deviceHealthScripts\",\"action\":{\"kind\":\"not_licensed\"}},
    {\"tenant\":\"$TAILSPIN\",\"path\":\"deviceAppManagement/mobileApps\",\"action\":{\"kind\":\"forbidden\"}},
    {\"tenant\":\"$CONTOSO\",\"path\":\"deviceManagement/deviceConfigurations\",\"action\":{\"kind\":\"slow\",\"delay_ms\":3000}}]"
}

ASKED=()
# Publishes a request in the background; `settle` waits for all of them.
ask() { # TENANT KEY WORDS SELECTION...
  say "  $3"
  timeout 120 "$BIN" request --tenant "$1" --key "$2" --wait "${@:4}" >>"$DEV/log/demo.log" 2>&1 &
  ASKED+=($!)
}

settle() { # ignores exit codes of partial and skipped runs
  local pid code
  for pid in "${ASKED[@]}"; do
    code=0
    wait "$pid" || code=$?
    [[ $code -ne 124 ]] || die "a request did not complete within two minutes: $(tail -n 1 "$DEV/log/demo.log")"
  done
  ASKED=()
}

latest_run() { # TENANT: the id of its newest run
  cli runs list --tenant "$1" --limit 1 --json | grep -m 1 -oE '"run_id": *"[0-9a-f-]+"' | grep -oE '[0-9a-f-]{36}'
}

until_running() { # TENANT
  local deadline=$((SECONDS + 20))
  until cli runs list --tenant "$1" --status running --json | grep -q "$1"; do
    ((SECONDS < deadline)) || die "no run of $1 started: deploy/dev logs"
    sleep 0.1
  done
}

malformed() { # STAMP
  local before deadline=$((SECONDS + 20))
  before=$(dead_letters)
  printf '{"schema_version": 1, "tenant_id": "contoso", "idempotency_key": "%s-bad", "selection": {"policy_types": ["*"]}}\n' "$1" >"$DEV/malformed.json"
  cli request --from-file "$DEV/malformed.json" >>"$DEV/log/demo.log" 2>&1 || die "publishing failed: $(tail -n 1 "$DEV/log/demo.log")"
  until (($(dead_letters) > before)); do
    ((SECONDS < deadline)) || die 'the malformed message did not become a dead letter: deploy/dev logs'
    sleep 0.2
  done
}

dead_letters() { cli dead list --json | grep -c '"reason"' || true; }

SUBSCRIBER=
subscribe() { # FILE
  local deadline=$((SECONDS + 20))
  "$BIN" events tail >"$1" 2>"$1.err" &
  SUBSCRIBER=$!
  trap 'kill "$SUBSCRIBER" 2>/dev/null || true' EXIT
  until grep -qs listening "$1.err"; do
    if ((SECONDS >= deadline)) || ! kill -0 "$SUBSCRIBER" 2>/dev/null; then die "cannot listen for events: $(tail -n 1 "$1.err")"; fi
    sleep 0.1
  done
}

# Prints the received events with tenant names instead of ids, and without dates and run ids.
show_events() { # FILE HOW_MANY
  local deadline=$((SECONDS + 20))
  until (($(wc -l <"$1") >= $2 || SECONDS >= deadline)); do sleep 0.2; done
  kill "$SUBSCRIBER" 2>/dev/null || true
  wait "$SUBSCRIBER" 2>/dev/null || true
  sed -E "s/$CONTOSO/Contoso  /; s/$FABRIKAM/Fabrikam /; s/$TAILSPIN/Tailspin /; s/  run [0-9a-f-]{36}//; s/^[0-9]{4}-[0-9]{2}-[0-9]{2} /  /" "$1"
}
