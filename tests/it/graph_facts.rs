//! Known facts about Graph, each with the tests that hold the daemon to it.

use std::path::Path;

/// A fact of Graph, and `file::test` of what was made of it.
type Fact = (&'static str, &'static [&'static str]);

const FACTS: &[Fact] = &[
    (
        "A list goes on until there is no next link; a link is opaque, some are percent-encoded twice",
        &[
            "tests/it/graph_client.rs::every_contract_list_is_read_to_its_end",
            "tests/it/graph_client.rs::next_links_are_followed_verbatim_over_http2_and_each_attempt_has_its_own_id",
            "src/graph/listing/next_link.rs::a_double_encoded_link_survives_byte_for_byte",
        ],
    ),
    (
        "A link does not carry headers: every page is asked for with them, under an id of its own",
        &["tests/it/graph.rs::every_request_uses_http2_with_its_headers_and_ids"],
    ),
    ("A page may be empty and yet not the last", &["tests/it/graph.rs::an_empty_page_does_not_end_a_list"]),
    (
        "`@odata.count` is no total",
        &[
            "src/graph/listing/decode.rs::ids_are_found_at_any_position",
            "tests/it/graph_client.rs::every_contract_list_is_read_to_its_end",
        ],
    ),
    (
        "A list can lead in a circle or bring the same objects for ever",
        &[
            "tests/it/graph_client.rs::loops_and_foreign_links_end_a_list",
            "src/graph/listing/pager.rs::a_link_is_followed_once",
            "src/graph/listing/pager.rs::a_list_must_progress_until_its_last_page",
        ],
    ),
    (
        "The same object can stand on two pages",
        &[
            "tests/it/graph_client.rs::repeated_ids_count_once_and_empty_pages_lose_nothing",
            "tests/it/inventory.rs::ids_repeated_across_pages_are_one_item",
        ],
    ),
    (
        "A link to another host would be sent the token",
        &[
            "src/graph/listing/next_link.rs::next_links_to_other_hosts_are_rejected",
            "src/graph/listing/next_link.rs::no_next_link_sends_the_token_to_another_host",
        ],
    ),
    (
        "Single pages fail with 504 or break off, and the same link works the next time",
        &["tests/it/graph_client.rs::broken_responses_are_requested_again_by_the_same_link"],
    ),
    (
        "Several kinds of object share a list, and one of a kind that is not known yet is still an object",
        &[
            "tests/it/contracts.rs::no_two_types_claim_the_same_object",
            "tests/it/inventory.rs::an_unclassified_object_is_counted_and_not_stored",
            "src/domain/item.rs::every_fixture_yields_its_expected_items",
        ],
    ),
    (
        "An object of the declared type has no `@odata.type`; no template is a null or family `none`",
        &["src/domain/item.rs::an_object_without_a_template_is_a_settings_catalog_policy"],
    ),
    (
        "Enums grow, flags are joined by commas, times have up to seven digits and any offset",
        &["src/domain/item.rs::unknown_enum_values_are_stored_unchanged"],
    ),
    (
        "One unknown property in `$select` fails the whole request; without `$select` secrets may come",
        &[
            "tests/it/graph.rs::a_refused_select_is_dropped_and_remembered_per_tenant",
            "tests/it/graph_client.rs::a_refused_select_is_dropped_and_remembered",
            "src/domain/item.rs::unknown_and_secret_properties_are_dropped",
        ],
    ),
    (
        "Errors stand in JSON inside `message`, up to three times over, and name tenants and servers",
        &[
            "src/graph/listing/error_body.rs::a_forbidden_inside_a_401_is_found_at_any_depth",
            "src/graph/listing/error_body.rs::only_plain_words_of_an_error_body_are_recorded",
            "tests/it/graph.rs::texts_of_graph_are_not_stored",
        ],
    ),
    (
        "A 401 can mean forbidden; an unknown path and a missing licence are a 400",
        &[
            "src/graph/listing/error_body.rs::each_kind_of_error_has_its_code",
            "tests/it/graph.rs::every_failure_has_its_own_code",
            "tests/it/graph_client.rs::an_unknown_path_is_unsupported",
        ],
    ),
    (
        "A missing permission is named in the message",
        &[
            "src/graph/listing/error_body.rs::named_permissions_are_kept_and_nothing_else",
            "tests/it/graph_credentials.rs::a_probe_returns_the_failure_of_a_run_and_the_missing_permission",
        ],
    ),
    (
        "Intune takes 1,000 requests of an application in 20 seconds, its devices family 2,000",
        &[
            "src/graph/limits/family.rs::every_family_of_the_contracts_has_its_limits",
            "src/graph/limits/sliding_window.rs::no_window_exceeds_the_limit",
            "src/graph/limits/sliding_window/properties.rs::graph_never_refuses_a_request",
            "tests/it/graph_limits.rs::the_rate_limiter_avoids_throttling_and_uses_the_allowance",
        ],
    ),
    (
        "Conditional Access takes one request a second, and says nothing of when to come back",
        &[
            "src/graph/limits/sliding_window.rs::conditional_access_has_no_burst_and_zero_is_no_limit",
            "src/graph/limits/family.rs::everything_of_conditional_access_is_paced_by_its_limit",
            "tests/it/fleet.rs::a_run_of_every_type_is_never_throttled",
            "tests/it/graph_limits.rs::conditional_access_gets_one_request_a_second",
        ],
    ),
    (
        "`Retry-After` is a number, a fraction, a date or absent; who comes back too early is counted again",
        &[
            "src/graph/limits/retry_after.rs::every_form_is_parsed_and_rounded_up",
            "tests/it/graph_client.rs::a_pause_is_waited_out_and_never_shortened",
            "tests/it/graph_limits.rs::without_a_rate_limit_no_request_is_sent_before_its_retry_after",
            "tests/it/fleet.rs::a_throttled_tenant_is_paused_on_every_replica",
        ],
    ),
    (
        "After a 503 another connection may lead to a server that answers",
        &["tests/it/graph_client.rs::a_503_is_retried_over_another_connection"],
    ),
    ("Most codes are final: only some are worth another try", &["tests/it/graph_client.rs::attempts_are_bounded"]),
    (
        "A token is good for about an hour and can end in the middle of a list; one without roles is given all the same",
        &[
            "tests/it/graph.rs::a_rejected_token_is_replaced",
            "tests/it/graph_client.rs::a_token_that_expires_within_a_list_is_renewed_once",
            "tests/it/graph_client.rs::concurrent_readers_share_one_token_request",
            "src/graph/auth/token.rs::roles_are_parsed_unless_the_token_is_opaque",
        ],
    ),
    (
        "A certificate signs an assertion with PS256, under `x5t#S256`",
        &[
            "src/graph/auth/client_assertion.rs::an_assertion_has_its_claims_and_a_valid_signature",
            "tests/it/graph_credentials.rs::a_certificate_gets_a_token",
        ],
    ),
    (
        "Each national cloud has a Graph and a token service of its own",
        &["src/config/tests.rs::each_cloud_has_its_own_graph_and_token_service"],
    ),
    (
        "Nothing but reading is asked for, of Graph and of an administrator",
        &[
            "tests/it/contracts.rs::every_permission_is_read_only",
            "tests/it/architecture.rs::graph_requests_use_get_only",
            "tests/it/inventory.rs::every_type_is_listed_and_only_by_get",
        ],
    ),
    (
        "Lists hold secrets and names of people",
        &[
            "tests/it/contracts.rs::no_secret_or_personal_property_is_selected",
            "src/domain/item.rs::sanitising_is_idempotent",
        ],
    ),
    (
        "A gateway answers in Graph's place: its 404 or 403 says nothing about what exists or is allowed",
        &[
            "tests/it/graph_tolerance.rs::a_404_of_a_gateway_proves_no_absence",
            "tests/it/graph_tolerance.rs::a_404_of_graph_proves_absence",
            "src/graph/listing/error_body.rs::absence_and_refusal_need_an_error_of_graph_itself",
        ],
    ),
    (
        "A singleton that does not exist is a 404 of Graph or a 204; an envelope or an OData null is no object",
        &[
            "tests/it/graph_tolerance.rs::a_204_is_an_absent_singleton_and_a_bad_list",
            "src/domain/item.rs::a_singleton_without_any_property_of_its_contract_is_bad",
        ],
    ),
    (
        "A response that has begun with 200 can break off in an error or in HTML",
        &[
            "tests/it/graph_tolerance.rs::an_error_in_a_200_keeps_its_code_and_is_never_data",
            "tests/it/graph_tolerance.rs::a_200_that_breaks_off_in_its_middle_is_retried",
            "src/graph/listing/decode.rs::an_error_inside_a_page_makes_it_incomplete_and_keeps_its_code",
        ],
    ),
    (
        "`$select` and `$top` are hints: services refuse them with 400, 500 or 501, in any words",
        &[
            "tests/it/graph_tolerance.rs::refused_query_options_are_dropped_one_after_the_other_and_remembered",
            "tests/it/contracts.rs::autopilot_devices_are_requested_without_select",
        ],
    ),
    (
        "A page token expires while a list is read",
        &[
            "tests/it/graph_tolerance.rs::an_expired_page_token_restarts_the_list",
            "src/graph/listing/error_body.rs::an_expired_page_token_is_recognised",
        ],
    ),
    (
        "A 503 without `Retry-After` is the failure of one service, not throttling",
        &["tests/it/graph_tolerance.rs::a_503_without_retry_after_does_not_pause_the_tenant"],
    ),
    (
        "Bodies begin with a byte order mark, an empty next link is the end, a header is repeated in one line or two",
        &[
            "tests/it/graph_tolerance.rs::a_byte_order_mark_is_ignored_before_every_body",
            "tests/it/graph_tolerance.rs::an_empty_next_link_is_the_end",
            "tests/it/graph_tolerance.rs::a_repeated_retry_after_is_read_once",
            "src/graph/transport.rs::of_two_retry_after_lines_the_longest_wait_counts",
            "src/graph/auth/token_service.rs::the_lines_of_a_repeated_header_are_one_value",
        ],
    ),
    (
        "One object, or the children of one parent, can be unreadable without the others",
        &[
            "tests/it/graph_tolerance.rs::one_bad_byte_or_control_character_costs_one_object",
            "tests/it/graph_tolerance.rs::a_parent_whose_children_are_refused_does_not_stop_its_siblings",
            "tests/it/graph_tolerance.rs::parent_ids_that_would_change_the_path_are_not_requested",
        ],
    ),
    (
        "A missing licence is a 400, 401 or 403 with many codes and sentences",
        &[
            "src/graph/listing/error_body.rs::a_missing_licence_is_not_applicable_whatever_the_words",
            "tests/it/not_applicable.rs::run_of_everything_succeeds_without_a_licence_for_some_types",
        ],
    ),
    (
        "Heartbeats and sync times move by themselves, and lists of ids come in any order",
        &[
            "tests/it/contracts.rs::no_property_that_moves_by_itself_is_kept",
            "tests/it/inventory.rs::heartbeats_and_the_order_of_scope_tags_are_no_change",
            "src/domain/item.rs::lists_of_strings_are_sets_and_their_order_is_no_change",
            "src/domain/item.rs::no_property_of_any_type_changes_with_the_order_of_its_texts",
        ],
    ),
    (
        "OData allows a next link that is relative to its page, and errors in the form of version 3",
        &[
            "tests/it/graph_tolerance.rs::a_relative_next_link_is_followed_on_the_same_host",
            "src/graph/listing/next_link.rs::relative_links_are_resolved_against_the_page_and_stay_on_its_host",
            "tests/it/graph_tolerance.rs::an_odata_3_error_is_an_error_of_graph",
        ],
    ),
    (
        "A 200 can have any shape: other envelopes, two documents, padding, a link that is no text",
        &["tests/it/graph_tolerance.rs::pages_of_other_shapes_are_never_complete"],
    ),
    (
        "A page can have millions of objects of a few bytes",
        &["tests/it/logs.rs::a_page_costs_memory_in_proportion_to_its_bytes"],
    ),
    (
        "A certificate is exported as PKCS#12, protected by a password, by old and new programs",
        &[
            "src/graph/auth/pkcs12.rs::files_of_older_programs_are_read",
            "src/graph/auth/pkcs12.rs::each_problem_of_a_file_is_named",
            "tests/it/graph_credentials.rs::a_pkcs12_file_gets_a_token_and_its_problems_are_named_without_a_network",
        ],
    ),
    (
        "A proxy answers CONNECT with 407 or a refusal of its own",
        &["tests/it/graph_proxy.rs::a_proxy_that_refuses_says_why"],
    ),
    (
        "The number of a token error is the only part of it that says what to do",
        &[
            "src/graph/auth/aadsts.rs::every_known_number_has_its_own_cause_and_cure",
            "src/graph/auth/aadsts.rs::only_an_outage_or_throttling_is_transient",
            "tests/it/graph.rs::status_names_the_cause_and_cure_of_a_missing_token_and_of_a_broken_connection",
        ],
    ),
    (
        "The metadata service of a host is local: a proxy cannot reach it, and must not see its tokens",
        &["tests/it/graph_proxy.rs::no_proxy_is_used_for_the_metadata_service"],
    ),
    (
        "Some lists are closed to every application but Microsoft's; a child list needs its parents' permission",
        &[
            "src/domain/catalog.rs::a_type_that_hardly_any_application_can_list_is_read_only_by_name",
            "src/domain/catalog.rs::a_child_type_names_the_permission_for_its_parents",
        ],
    ),
    (
        "A managed identity gives the token of its own tenant, whichever is asked for",
        &["tests/it/graph_credentials.rs::a_token_of_another_tenant_is_rejected"],
    ),
    (
        "An incomplete list says nothing of what is gone",
        &["tests/it/missing.rs::confidence_is_low_after_a_partial_run_and_names_complete_types"],
    ),
];

#[test]
fn every_fact_is_held_by_a_test_that_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (fact, tests) in FACTS {
        assert!(!tests.is_empty(), "{fact}");
        for test in *tests {
            let (file, name) = test.split_once("::").unwrap();
            let text = std::fs::read_to_string(root.join(file)).unwrap_or_else(|_| panic!("{fact}: no file {file}"));
            assert!(text.contains(&format!("fn {name}(")), "{fact}: no test {test}");
        }
    }
}
