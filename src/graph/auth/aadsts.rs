//! Meaning of the `AADSTS` numbers of Microsoft's token service: cause and cure.

/// Cause and cure of a failed request for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenAdvice {
    /// Cause of the failure.
    pub(super) cause: &'static str,
    /// Cure, as an instruction.
    pub(super) cure: &'static str,
}

const ADVICE: &[(u32, &str, &str)] = &[
    (7_000_215, "The client secret is wrong.", "Set client_secret to the value of the secret, not to its id."),
    (7_000_222, "The client secret has expired.", "Create a new secret for the application and replace client_secret."),
    (700_016, "The tenant does not know the application.", "Check client_id; grant admin consent in the tenant."),
    (90_002, "The tenant does not exist in this cloud.", "Check the tenant's id and graph.cloud."),
    (
        53_003,
        "A Conditional Access policy of the tenant blocks the application.",
        "Exclude the application from the policy, or allow the network that the daemon runs in.",
    ),
    (500_011, "The tenant does not know the resource.", "Check graph.cloud and graph.base_url."),
    (7_000_112, "The application is disabled in the tenant.", "Enable the enterprise application in the tenant."),
    (
        700_024,
        "The client assertion is outside its validity period.",
        "Synchronise the clock of this host; check that the federated token file is renewed.",
    ),
    (
        700_213,
        "No federated credential of the application matches the token.",
        "Compare issuer, subject and audience of the federated credential with those of the token.",
    ),
    (70_021, "No federated credential of the application matches the token.", "Compare issuer, subject and audience."),
    (90_055, "The token service throttles the tenant.", "Wait; the request is retried."),
    (90_033, "The token service is temporarily unavailable.", "Wait; the request is retried."),
    (50_034, "The account does not exist in the tenant.", "Check client_id and the tenant's id."),
    (
        7_000_229,
        "The application has no service principal in the tenant.",
        "Grant admin consent in the tenant, which creates the service principal.",
    ),
    (7_000_218, "The request contained neither a secret nor an assertion.", "Set client_secret or a certificate."),
    (700_027, "The certificate is not registered with the application.", "Upload the certificate to the application."),
    (50_027, "The client assertion is not valid.", "Check the certificate or the federated token file."),
    (65_001, "The application has no consent in the tenant.", "Grant admin consent in the tenant."),
];

/// Advice for an error code as `AADSTS7000215`, if the number is a known one.
pub(super) fn token_advice(graph_code: &str) -> Option<TokenAdvice> {
    let number: u32 = graph_code.strip_prefix("AADSTS")?.parse().ok()?;
    let known = ADVICE.iter().find(|(known, ..)| *known == number);
    known.map(|&(_, cause, cure)| TokenAdvice { cause, cure })
}

/// Returns `true` for a number that says that the token service itself is the problem.
pub(super) fn is_transient(number: u32) -> bool {
    [90_055, 90_033, 50_196].contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number with a part of its cause and of its cure.
    const EXPECTED: [(u32, &str, &str); 18] = [
        (7_000_215, "secret is wrong", "not to its id"),
        (7_000_222, "secret has expired", "Create a new secret"),
        (700_016, "does not know the application", "Check client_id"),
        (90_002, "tenant does not exist", "graph.cloud"),
        (53_003, "Conditional Access policy", "Exclude the application"),
        (500_011, "does not know the resource", "graph.base_url"),
        (7_000_112, "application is disabled", "Enable the enterprise application"),
        (700_024, "outside its validity period", "clock of this host"),
        (700_213, "No federated credential", "issuer, subject and audience"),
        (70_021, "No federated credential", "issuer, subject and audience"),
        (90_055, "throttles the tenant", "is retried"),
        (90_033, "temporarily unavailable", "is retried"),
        (50_034, "account does not exist", "tenant's id"),
        (7_000_229, "no service principal", "Grant admin consent"),
        (7_000_218, "neither a secret nor an assertion", "Set client_secret"),
        (700_027, "not registered with the application", "Upload the certificate"),
        (50_027, "assertion is not valid", "federated token file"),
        (65_001, "no consent", "Grant admin consent"),
    ];

    #[test]
    fn every_known_number_has_its_own_cause_and_cure() {
        assert_eq!(EXPECTED.len(), ADVICE.len(), "every number is in the table");
        for (number, cause, cure) in EXPECTED {
            let advice = token_advice(&format!("AADSTS{number}")).unwrap_or_else(|| panic!("{number} is unknown"));
            assert!(advice.cause.contains(cause) && advice.cause.ends_with('.'), "{number}: {advice:?}");
            assert!(advice.cure.contains(cure) && advice.cure.ends_with('.'), "{number}: {advice:?}");
        }
        assert_eq!(token_advice("AADSTS1"), None);
        assert_eq!(token_advice("Forbidden"), None);
    }

    #[test]
    fn only_an_outage_or_throttling_is_transient() {
        let numbers = EXPECTED.map(|(number, ..)| number);
        let transient: Vec<u32> = numbers.into_iter().filter(|number| is_transient(*number)).collect();
        assert_eq!(transient, [90_055, 90_033]);
        assert!(is_transient(50_196), "a client that repeats the same request is throttled");
    }
}
