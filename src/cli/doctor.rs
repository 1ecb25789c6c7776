//! `inventoryd doctor`: tests which policy types of a tenant can be read, and reports the missing permissions.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use schemars::JsonSchema;
use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::ids::unknown_tenant;
use super::output::or_dash;
use super::progress::spinner;
use super::selection::SelectionArgs;
use super::{CliError, Context, Outcome, note};
use crate::config::{CredentialConfig, CredentialKind, credential_by_name};
use crate::domain::catalog::{Catalog, Listing, Scope};
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::policy_type::PolicyType;
use crate::domain::selection::Selection;
use crate::fleet::grant_turns;
use crate::graph::{GraphClient, ProbeFailure, TokenFailure};

/// Number of concurrent probes; small, because the tenant's limits are shared.
const AT_ONCE: usize = 4;

/// Test which policy types of a tenant can be read, and report missing permissions
///
/// Reads one page of every selected list. Exit code 0 if all of them can be read.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Tenant id
    #[arg(long, value_name = "GUID")]
    tenant: Uuid,
    /// Credential to test instead of the registered one; the tenant need not be registered then
    #[arg(long, value_name = "NAME")]
    credential: Option<String>,
    #[command(flatten)]
    selection: SelectionArgs,
}

/// Result for one policy type.
#[derive(Debug, Clone, Serialize, JsonSchema)]
struct Finding {
    /// Policy type.
    policy_type: String,
    /// True if its list can be read.
    works: bool,
    #[serde(flatten)]
    failure: Option<Failure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Permission that the list requires.
    permission: String,
    /// Permissions to grant; one of them is enough.
    missing_permissions: Vec<String>,
}

/// Result for a tenant, as printed with `--json`.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "inventoryd doctor, version 1")]
pub(super) struct Document<'a> {
    /// The tenant.
    tenant_id: Uuid,
    /// Name of the tested credential.
    credential: &'a str,
    /// Proxy in use, or an empty text.
    proxy: &'a str,
    /// Permissions in the token; null if they are not known.
    granted_permissions: Option<&'a [String]>,
    /// Permissions to grant.
    missing_permissions: BTreeSet<&'a str>,
    /// Admin consent link, if the application is known.
    consent_link: Option<&'a str>,
    /// Number of types that can be read.
    working: usize,
    /// Types that can be read.
    readable_types: Vec<&'a str>,
    /// The tested types.
    types: &'a [Finding],
    /// Failure to get a token, in which case nothing was tested.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<NoToken>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct NoToken {
    failure: Failure,
    cause: String,
    cure: String,
    retry_after_s: Option<u64>,
}

impl<'a> Document<'a> {
    fn of(probe: &'a ProbeContext<'a>, findings: &'a [Finding], roles: Option<&'a [String]>) -> Self {
        let missing = findings.iter().flat_map(|finding| &finding.missing_permissions);
        let readable_types = readable(findings);
        Self {
            tenant_id: probe.tenant_id,
            credential: probe.credential,
            proxy: probe.proxy,
            granted_permissions: roles,
            missing_permissions: missing.map(String::as_str).collect(),
            consent_link: probe.consent_link.as_deref(),
            working: readable_types.len(),
            readable_types,
            types: findings,
            token: None,
        }
    }
}

struct ProbeContext<'a> {
    graph: &'a GraphClient,
    tenant_id: Uuid,
    credential: &'a str,
    consent_link: Option<String>,
    proxy: &'a str,
}

pub(super) async fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let (credential, store) = match &args.credential {
        Some(name) => (name.clone(), None),
        None => {
            let store = context.store().await?;
            let name = store.tenant_credential(args.tenant).await?.ok_or_else(|| unknown_tenant(args.tenant))?;
            (name, Some(store))
        }
    };
    let configured = credential_by_name(&config.graph.credentials, &credential).ok_or_else(|| {
        CliError::Failed(format!(
            "graph.credentials.{credential}: not found in the configuration; add it, or choose another with --credential"
        ))
    })?;
    let scope = scope(&args.selection, &config.graph.catalog()?)?;
    let graph = GraphClient::new(&config.graph).map_err(|error| CliError::Failed(error.to_string()))?;
    // The daemon's pauses and turns hold for this command too, and a 429 of this command holds for the daemon.
    let mut notices = graph.pause_notices();
    let grants = store.clone().map(|store| grant_turns(store, graph.turn_requests()));
    let _granting = grants.map(|grants| AbortOnDropHandle::new(tokio::spawn(grants)));
    if let Some(store) = &store {
        for pause in store.pauses().await?.into_iter().filter(|pause| pause.tenant_id == args.tenant) {
            graph.pause(args.tenant, &pause.family, Duration::from_secs_f64(pause.left_s.max(0.0)));
        }
    }
    let consent_link = consent_link(config.graph.authority(), args.tenant, configured);
    let probe = ProbeContext {
        graph: &graph,
        tenant_id: args.tenant,
        credential: &credential,
        consent_link,
        proxy: &config.graph.proxy,
    };
    let roles = match graph.token_roles(args.tenant, &credential).await {
        Ok(roles) => roles,
        Err(failure) => return no_token(&probe, &failure, context),
    };
    let findings = examine(&probe, scope, roles.as_deref()).await;
    while let (Some(store), Ok(notice)) = (&store, notices.try_recv()) {
        store.announce_pause(notice.tenant_id, notice.family, notice.duration).await?;
    }
    report(&probe, &findings, roles.as_deref(), context)?;
    Ok(if findings.iter().all(|finding| finding.works) { Outcome::Done } else { Outcome::Unsuccessful })
}

/// Admin consent link for the application; none for an identity that has no configured client id.
fn consent_link(authority: &str, tenant_id: Uuid, credential: &CredentialConfig) -> Option<String> {
    let is_application = credential.kind != CredentialKind::ManagedIdentity && !credential.client_id.is_empty();
    is_application.then(|| format!("{authority}/{tenant_id}/adminconsent?client_id={}", credential.client_id))
}

/// Selected types; all types by default.
fn scope(flags: &SelectionArgs, catalog: &Catalog) -> Result<Scope, CliError> {
    let selection = if flags.is_absent() { Selection::everything() } else { flags.to_selection()? };
    let scope = catalog.resolve_request(&selection).map_err(|_| {
        CliError::Usage(
            "nothing to check: the selection names only foundations, and --no-foundations excludes them".to_owned(),
        )
    })?;
    match scope.unsupported.as_slice() {
        [] => Ok(scope),
        unknown => Err(CliError::Usage(format!("unknown: {}; `inventoryd types` lists all types", unknown.join(", ")))),
    }
}

/// Reports why there is no token: by the number of the token service, else by the local reason.
fn no_token(probe: &ProbeContext<'_>, failed: &TokenFailure, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let (cause, cure) = failed.explain(probe.credential);
    if context.out.is_json() {
        let token = NoToken {
            failure: failed.failure.clone(),
            cause,
            cure,
            retry_after_s: failed.retry_after.map(|wait| wait.as_secs()),
        };
        context.out.json(&Document { token: Some(token), ..Document::of(probe, &[], None) })?;
        return Ok(Outcome::Unsuccessful);
    }
    let number = failed.failure.graph_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
    Err(CliError::Failed(format!("{}{number}: {cause} {cure}", failed.failure.code)))
}

async fn examine(probe: &ProbeContext<'_>, scope: Scope, roles: Option<&[String]>) -> Vec<Finding> {
    let count = scope.listings.len();
    let waiting = spinner(format!("testing {count} lists"));
    let tries = stream::iter(scope.listings).map(async |listing: Listing| {
        let tried = probe.graph.probe(probe.tenant_id, probe.credential, &listing.collection).await;
        findings_of(&listing, tried.err().as_ref(), roles)
    });
    let mut findings: Vec<Finding> = tries.buffer_unordered(AT_ONCE).flat_map(stream::iter).collect().await;
    waiting.finish_and_clear();
    findings.sort_by(|a, b| (a.works, &a.policy_type).cmp(&(b.works, &b.policy_type)));
    findings
}

fn findings_of(listing: &Listing, refused: Option<&ProbeFailure>, roles: Option<&[String]>) -> Vec<Finding> {
    let finding = |policy_type: &PolicyType| Finding {
        policy_type: policy_type.key.clone(),
        works: refused.is_none(),
        failure: refused.map(|refused| refused.failure.clone()),
        detail: refused.and_then(|refused| refused.detail.clone()),
        permission: policy_type.permission.clone(),
        missing_permissions: refused.map(|refused| missing(policy_type, refused, roles)).unwrap_or_default(),
    };
    listing.selected.iter().map(|policy_type| finding(policy_type)).collect()
}

/// Permissions to grant. Those named by Graph take precedence; if Graph names none, the contract's permission is
/// suggested unless the token already has it.
fn missing(policy_type: &PolicyType, refused: &ProbeFailure, roles: Option<&[String]>) -> Vec<String> {
    if !refused.missing_permissions.is_empty() {
        return refused.missing_permissions.clone();
    }
    let is_granted = |wanted: &str| roles.is_some_and(|roles| roles.iter().any(|role| grants(role, wanted)));
    let is_refused = matches!(refused.failure.code, ErrorCode::GraphForbidden | ErrorCode::GraphUnauthorized);
    let wanted = policy_type.permissions().filter(|permission| is_refused && !is_granted(permission));
    wanted.map(str::to_owned).collect()
}

/// True if a role includes a permission; write access includes read access.
fn grants(role: &str, wanted: &str) -> bool {
    role == wanted || role.replace(".ReadWrite.", ".Read.") == wanted
}

fn report(
    probe: &ProbeContext<'_>,
    findings: &[Finding],
    roles: Option<&[String]>,
    context: &mut Context<'_>,
) -> Result<(), CliError> {
    let to_grant: BTreeSet<&str> =
        findings.iter().flat_map(|finding| &finding.missing_permissions).map(String::as_str).collect();
    let working = findings.iter().filter(|finding| finding.works).count();
    let writing: Vec<&str> =
        roles.unwrap_or_default().iter().map(String::as_str).filter(|role| role.contains("Write")).collect();
    if !writing.is_empty() {
        note(format_args!(
            "note: the application has write permissions, which inventoryd does not need: {}",
            writing.join(", ")
        ));
    }
    if context.out.is_json() {
        return context.out.json(&Document::of(probe, findings, roles));
    }
    if !probe.proxy.is_empty() {
        context.out.line(format_args!("through the proxy {}", probe.proxy))?;
    }
    let header = ["type", "readable", "problem", "grant", "remedy"];
    context.out.table(header, &["remedy"], findings.iter().map(row))?;
    context.out.line(format_args!("{working} of {} types can be read", findings.len()))?;
    if working > 0 && working < findings.len() {
        context.out.line(format_args!("a request that succeeds now: --types {}", readable(findings).join(",")))?;
    }
    if to_grant.is_empty() {
        return Ok(());
    }
    let to_grant: Vec<&str> = to_grant.into_iter().collect();
    context.out.line(format_args!("grant with admin consent: {}", to_grant.join(", ")))?;
    match &probe.consent_link {
        Some(link) => {
            context.out.line(format_args!("consent link, after adding the permissions to the application: {link}"))
        }
        None => Ok(()),
    }
}

fn readable(findings: &[Finding]) -> Vec<&str> {
    findings.iter().filter(|finding| finding.works).map(|finding| finding.policy_type.as_str()).collect()
}

/// Remedy beyond this command, to which the general one of some codes leads.
fn remedy(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::GraphForbidden => {
            "The token has the permission. After a new consent, wait for a new token (up to an hour); otherwise check \
             which policy of the tenant blocks the application."
        }
        ErrorCode::GraphUnauthorized => {
            "Check graph.cloud, graph.base_url and the tenant's Conditional Access policies for applications."
        }
        ErrorCode::CredentialUnavailable => "Correct the credential in graph.credentials.",
        code => code.remedy(),
    }
}

fn row(finding: &Finding) -> [String; 5] {
    let code = finding.failure.as_ref().map(|failure| failure.code);
    // A missing permission is remedy enough.
    let remedy = code.filter(|_| finding.missing_permissions.is_empty()).map(remedy);
    [
        finding.policy_type.clone(),
        if finding.works { "yes".to_owned() } else { "no".to_owned() },
        or_dash(code.as_ref()),
        finding.missing_permissions.join(" or "),
        finding.detail.as_deref().or(remedy).unwrap_or_default().to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: ErrorCode, permissions: &[&str]) -> ProbeFailure {
        let missing_permissions = permissions.iter().map(|one| (*one).to_owned()).collect();
        ProbeFailure { failure: code.into(), detail: None, missing_permissions }
    }

    #[test]
    fn missing_permissions_come_from_graph_or_the_contract() {
        let catalog = Catalog::built_in();
        let app = catalog.get("mobileApp").unwrap();
        let forbidden = refused(ErrorCode::GraphForbidden, &[]);
        assert_eq!(missing(app, &forbidden, None), [app.permission.as_str()]);
        assert_eq!(missing(app, &forbidden, Some(&[])), [app.permission.as_str()]);
        let has_it = [app.permission.replace(".Read.", ".ReadWrite.")];
        assert!(missing(app, &forbidden, Some(&has_it)).is_empty(), "a granted permission is not what is missing");
        assert_eq!(missing(app, &refused(ErrorCode::GraphForbidden, &["X.Read.All"]), Some(&has_it)), ["X.Read.All"]);
        assert!(missing(app, &refused(ErrorCode::GraphThrottled, &[]), None).is_empty());
    }

    #[test]
    fn consent_link_requires_a_configured_application() {
        let mut credential = CredentialConfig { client_id: "app".to_owned(), ..CredentialConfig::default() };
        let link = consent_link("https://login.example", Uuid::nil(), &credential);
        let expected = "https://login.example/00000000-0000-0000-0000-000000000000/adminconsent?client_id=app";
        assert_eq!(link.as_deref(), Some(expected));
        credential.kind = CredentialKind::ManagedIdentity;
        assert_eq!(consent_link("https://login.example", Uuid::nil(), &credential), None);
    }

    #[test]
    fn no_remedy_leads_back_to_this_command() {
        let catalog = Catalog::built_in();
        let scope = scope(&SelectionArgs::default(), &catalog).unwrap();
        let roles: Vec<String> = catalog.types().flat_map(|t| t.permissions()).map(str::to_owned).collect();
        for code in ErrorCode::ALL {
            let found = findings_of(&scope.listings[0], Some(&refused(*code, &[])), Some(&roles));
            let shown = row(&found[0])[4].clone();
            assert!(!shown.is_empty() && !shown.contains("inventoryd doctor"), "{code}: {shown}");
            assert!(![code.cause(), code.remedy()].concat().contains("Intune"), "{code}: not every type is Intune's");
        }
    }

    #[test]
    fn every_type_of_a_shared_list_has_a_row() {
        let catalog = Catalog::built_in();
        let scope = scope(&SelectionArgs::default(), &catalog).unwrap();
        let rows: usize = scope.listings.iter().map(|listing| findings_of(listing, None, None).len()).sum();
        assert_eq!(rows, catalog.types().filter(|one| !one.only_by_name).count());
        let failing = findings_of(&scope.listings[0], Some(&refused(ErrorCode::GraphNotApplicable, &[])), None);
        assert!(row(&failing[0])[4].contains("license"), "{:?}", row(&failing[0]));
    }
}
