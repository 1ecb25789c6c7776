//! What is known of Graph, and which test holds the daemon to each of it.

use std::path::Path;

/// A fact of Graph, and `file::test` of what was made of it.
type Fact = (&'static str, &'static [&'static str]);

const FACTS: &[Fact] = &[
    (
        "A list goes on until there is no next link; a link is opaque, some are percent-encoded twice",
        &[
            "tests/it/graph_client.rs::every_list_of_the_contracts_is_read_to_its_end",
            "tests/it/graph_client.rs::opaque_links_are_followed_untouched_over_http2_and_each_try_has_an_id_of_its_own",
            "src/graph/walk.rs::a_double_encoded_link_survives_byte_for_byte",
        ],
    ),
    (
        "A link does not carry headers: every page is asked for with them, under an id of its own",
        &["tests/it/graph.rs::graph_is_spoken_to_as_it_wants"],
    ),
    ("A page may be empty and yet not the last", &["tests/it/graph.rs::empty_pages_are_no_end"]),
    (
        "`@odata.count` is no total",
        &[
            "src/graph/page.rs::objects_keep_their_bytes_and_ids_are_found_wherever_they_stand",
            "tests/it/graph_client.rs::every_list_of_the_contracts_is_read_to_its_end",
        ],
    ),
    (
        "A list can lead in a circle or bring the same objects for ever",
        &[
            "tests/it/graph_client.rs::lists_that_lead_astray_are_given_up",
            "src/graph/walk.rs::a_link_is_followed_once",
            "src/graph/walk.rs::a_list_must_get_on_but_may_end_as_it_likes",
        ],
    ),
    (
        "The same object can stand on two pages",
        &[
            "tests/it/graph_client.rs::ids_repeated_across_pages_are_seen_once_and_empty_pages_lose_nothing",
            "tests/it/inventory.rs::ids_repeated_across_pages_are_one_item",
        ],
    ),
    (
        "A link to another host would be sent the token",
        &[
            "src/graph/walk.rs::links_to_other_places_are_refused",
            "src/graph/walk.rs::whatever_a_link_looks_like_the_token_goes_to_graph_alone",
        ],
    ),
    (
        "Single pages fail with 504 or break off, and the same link works the next time",
        &["tests/it/graph_client.rs::what_breaks_on_its_way_is_asked_for_again_by_the_same_link"],
    ),
    (
        "Several kinds of object share a list, and one of a kind that is not known yet is still an object",
        &[
            "tests/it/contracts.rs::no_two_types_claim_the_same_object",
            "tests/it/inventory.rs::an_unclassified_object_is_counted_and_not_stored",
            "src/domain/item.rs::every_fixture_comes_out_as_expected",
        ],
    ),
    (
        "An object of the declared type has no `@odata.type`; no template is a null or family `none`",
        &["src/domain/item.rs::without_a_type_of_its_own_an_object_is_of_the_declared_one"],
    ),
    (
        "Enums grow, flags are joined by commas, times have up to seven digits and any offset",
        &["src/domain/item.rs::what_graph_will_say_tomorrow_is_kept_as_it_says_it"],
    ),
    (
        "One unknown property in `$select` fails the whole request; without `$select` secrets may come",
        &[
            "tests/it/graph.rs::a_refused_select_is_left_out_once_and_remembered",
            "tests/it/graph_client.rs::a_refused_select_is_left_out_once_and_remembered",
            "src/domain/item.rs::unknown_and_secret_properties_are_dropped",
        ],
    ),
    (
        "Errors stand in JSON inside `message`, up to three times over, and name tenants and servers",
        &[
            "src/graph/answer.rs::a_forbidden_inside_a_401_is_found_at_any_depth",
            "src/graph/answer.rs::whatever_an_error_body_says_only_plain_words_of_it_are_recorded",
            "tests/it/graph.rs::nothing_of_graphs_messages_is_kept",
        ],
    ),
    (
        "A 401 can mean forbidden; an unknown path and a missing licence are a 400",
        &[
            "src/graph/answer.rs::each_kind_of_refusal_has_its_code",
            "tests/it/graph.rs::every_refusal_has_its_own_code",
            "tests/it/graph_client.rs::a_path_that_this_graph_does_not_know_is_unsupported",
        ],
    ),
    (
        "A missing permission is named in the message",
        &[
            "src/graph/answer.rs::the_permissions_that_graph_names_are_kept_and_nothing_else",
            "tests/it/graph_credentials.rs::a_probe_says_what_a_run_would_meet_and_which_permission_is_missing",
        ],
    ),
    (
        "Intune takes 1,000 requests of an application in 20 seconds, its devices family 2,000",
        &[
            "src/graph/throttle.rs::every_family_of_the_contracts_has_its_limits",
            "src/graph/pace.rs::no_window_holds_more_than_the_limit",
            "tests/it/graph_limits.rs::under_its_own_pace_it_is_never_throttled_and_hardly_slower_than_allowed",
        ],
    ),
    (
        "Conditional Access takes one request a second, and says nothing of when to come back",
        &[
            "src/graph/pace.rs::conditional_access_is_asked_one_by_one_and_no_limit_is_no_pace",
            "tests/it/graph_limits.rs::conditional_access_is_asked_once_a_second_at_most",
        ],
    ),
    (
        "`Retry-After` is a number, a fraction, a date or absent; who comes back too early is counted again",
        &[
            "src/graph/retry_after.rs::every_form_is_read_and_rounded_up",
            "tests/it/graph_client.rs::throttling_is_waited_out_and_never_too_early",
            "tests/it/graph_limits.rs::without_a_pace_it_is_throttled_but_never_comes_back_too_early",
            "tests/it/fleet.rs::a_throttled_tenant_is_paused_on_every_replica",
        ],
    ),
    (
        "After a 503 another connection may lead to a server that answers",
        &["tests/it/graph_client.rs::after_a_503_graph_is_asked_over_another_connection"],
    ),
    ("Most codes are final: only some are worth another try", &["tests/it/graph_client.rs::tries_end"]),
    (
        "A token is good for about an hour and can end in the middle of a list; one without roles is given all the same",
        &[
            "tests/it/graph.rs::a_token_that_ends_early_is_replaced",
            "tests/it/graph_client.rs::a_token_that_ends_in_the_middle_is_renewed_once",
            "tests/it/graph_client.rs::a_token_is_asked_for_once_however_many_want_it",
            "src/graph/token.rs::roles_are_read_where_a_token_can_be_read",
        ],
    ),
    (
        "A certificate signs an assertion with PS256, under `x5t#S256`",
        &[
            "src/graph/assertion.rs::the_assertion_has_its_claims_and_a_signature_that_holds",
            "tests/it/graph_credentials.rs::a_certificate_gets_a_token",
        ],
    ),
    (
        "Each national cloud has a Graph and a token service of its own",
        &["src/config.rs::each_cloud_has_its_own_graph_and_token_service"],
    ),
    (
        "Nothing but reading is asked for, of Graph and of an administrator",
        &[
            "tests/it/contracts.rs::every_permission_is_read_only",
            "tests/it/architecture.rs::nothing_can_write_to_graph",
            "tests/it/inventory.rs::every_type_is_listed_and_only_by_get",
        ],
    ),
    (
        "Lists hold secrets and names of people",
        &[
            "tests/it/contracts.rs::no_secret_or_personal_property_is_selected",
            "src/domain/item.rs::sanitizing_what_is_stored_changes_nothing",
        ],
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
