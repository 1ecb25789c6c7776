//! The token endpoint: client credentials with a secret or an assertion, and readable tokens that belong to one tenant.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use azure_core::base64::{decode_url_safe, encode_url_safe};
use parking_lot::Mutex;
use serde_json::{Value, json};
use url::form_urlencoded;
use uuid::Uuid;

use super::errors::{CallIds, token_error};
use super::reply::Reply;
use super::seed::mix;
use super::text::now;

/// The permissions of the application.
pub const ROLES: [&str; 2] = ["DeviceManagementApps.Read.All", "DeviceManagementConfiguration.Read.All"];
const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// Number of kept tokens at which expired ones are removed.
const SWEEP_AT: usize = 10_000;

/// The application that may ask for tokens, and the tokens that it got.
#[derive(Debug)]
pub struct Tokens {
    client_id: String,
    client_secret: String,
    lifetime_s: AtomicU64,
    issued: Mutex<HashMap<String, (Uuid, Instant)>>,
}

/// Result of checking a bearer token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bearer {
    /// Good, for this tenant.
    Tenant(Uuid),
    /// Issued here, but expired.
    Expired,
    /// Missing, or not issued here.
    Unknown,
}

/// `error`, the `AADSTS` number, the text, the HTTP status.
type Refusal = (&'static str, u32, String, u16);

impl Tokens {
    /// An application and the lifetime of its tokens.
    pub fn new(client_id: &str, client_secret: &str, lifetime_s: u64) -> Tokens {
        Tokens {
            client_id: client_id.to_owned(),
            client_secret: client_secret.to_owned(),
            lifetime_s: AtomicU64::new(lifetime_s),
            issued: Mutex::default(),
        }
    }

    /// The lifetime of tokens issued from now on.
    pub fn set_lifetime_s(&self, lifetime_s: u64) {
        self.lifetime_s.store(lifetime_s, Ordering::Relaxed);
    }

    /// Revokes the tokens of one tenant, or all.
    pub fn expire(&self, tenant: Option<Uuid>) {
        let now = Instant::now();
        let mut issued = self.issued.lock();
        for (of_tenant, until) in issued.values_mut() {
            if tenant.is_none_or(|tenant| tenant == *of_tenant) {
                *until = now;
            }
        }
    }

    /// Looks at an `Authorization` header.
    pub fn check(&self, authorization: Option<&str>) -> Bearer {
        let Some(token) = authorization.and_then(|header| header.strip_prefix("Bearer ")) else {
            return Bearer::Unknown;
        };
        match self.issued.lock().get(token) {
            Some((tenant, until)) if Instant::now() < *until => Bearer::Tenant(*tenant),
            Some(_) => Bearer::Expired,
            None => Bearer::Unknown,
        }
    }

    /// Answers `POST /{tenant}/oauth2/v2.0/token`; a foreign token names another tenant in its claims.
    pub fn answer(&self, tenant: &str, form: &[u8], ids: &CallIds, is_foreign: bool) -> Reply {
        let form: HashMap<String, String> = form_urlencoded::parse(form).into_owned().collect();
        let reply = match self.judge(tenant, &form) {
            Ok(tenant) => {
                let lifetime_s = self.lifetime_s.load(Ordering::Relaxed);
                let token = self.issue(tenant, lifetime_s, is_foreign);
                Reply::json(Bytes::from(
                    json!({
                        "token_type": "Bearer",
                        "expires_in": lifetime_s,
                        "ext_expires_in": lifetime_s,
                        "access_token": token,
                    })
                    .to_string(),
                ))
            }
            Err((error, number, text, status)) => {
                Reply { status, ..Reply::json(token_error(error, number, &text, ids)) }
            }
        };
        Reply { content_type: "application/json; charset=utf-8", ..reply }
    }

    fn judge(&self, tenant: &str, form: &HashMap<String, String>) -> Result<Uuid, Refusal> {
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let tenant_id = Uuid::try_parse(tenant)
            .map_err(|_| ("invalid_request", 90_002, format!("Tenant '{tenant}' not found."), 400))?;
        if field("grant_type") != "client_credentials" {
            let text = format!("The app requested an unsupported grant type '{}'.", field("grant_type"));
            return Err(("unsupported_grant_type", 70_003, text, 400));
        }
        if field("client_id") != self.client_id {
            let text = format!("Application with identifier '{}' was not found in the directory.", field("client_id"));
            return Err(("unauthorized_client", 700_016, text, 400));
        }
        if !field("scope").ends_with("/.default") || field("scope").contains(' ') {
            let text =
                format!("The provided value for the input parameter 'scope' is not valid: '{}'.", field("scope"));
            return Err(("invalid_scope", 70_011, text, 400));
        }
        if form.contains_key("client_assertion") {
            return self.judge_assertion(form).map(|()| tenant_id);
        }
        match field("client_secret") {
            "" => {
                let text = "The request body must contain: 'client_assertion' or 'client_secret'.".to_owned();
                Err(("invalid_client", 7_000_218, text, 401))
            }
            secret if secret == self.client_secret => Ok(tenant_id),
            _ => Err(("invalid_client", 7_000_215, "Invalid client secret provided.".to_owned(), 401)),
        }
    }

    fn judge_assertion(&self, form: &HashMap<String, String>) -> Result<(), Refusal> {
        let refuse = |text: String| Err(("invalid_client", 50_027, format!("JWT token is invalid: {text}"), 401));
        if form.get("client_assertion_type").map(String::as_str) != Some(ASSERTION_TYPE) {
            return refuse("client_assertion_type is missing or unknown.".to_owned());
        }
        let assertion = form.get("client_assertion").map(String::as_str).unwrap_or_default();
        let Some((header, claims)) = jwt_parts(assertion) else {
            return refuse("not three parts of base64url with JSON inside.".to_owned());
        };
        if !matches!(header["alg"].as_str(), Some("PS256" | "RS256")) {
            return refuse(format!("alg {} is not allowed.", header["alg"]));
        }
        for name in ["aud", "iss", "sub"] {
            if claims[name].as_str().is_none_or(str::is_empty) {
                return refuse(format!("claim {name} is missing."));
            }
        }
        let now = now().unix_timestamp();
        match claims["exp"].as_i64() {
            None => refuse("claim exp is missing.".to_owned()),
            Some(expiry) if expiry <= now => {
                Err(("invalid_client", 700_024, "Client assertion is not within its valid time range.".into(), 401))
            }
            Some(_) => Ok(()),
        }
    }

    /// A readable JWT with the tenant and the permissions in its claims, as real tokens are, and a made-up signature.
    fn issue(&self, tenant: Uuid, lifetime_s: u64, is_foreign: bool) -> String {
        let tid = if is_foreign { Uuid::from_u128(!tenant.as_u128()) } else { tenant };
        let claims = json!({ "tid": tid, "roles": ROLES, "uti": Uuid::new_v4() }).to_string();
        let signature = mix(Uuid::new_v4().as_u64_pair().0);
        let token = format!(
            "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.{}.{}{signature:016x}",
            encode_url_safe(claims.as_bytes()),
            Uuid::new_v4().simple()
        );
        let now = Instant::now();
        let mut issued = self.issued.lock();
        if issued.len() >= SWEEP_AT {
            issued.retain(|_, (_, until)| now < *until);
        }
        issued.insert(token.clone(), (tenant, now + Duration::from_secs(lifetime_s)));
        token
    }
}

fn jwt_parts(assertion: &str) -> Option<(Value, Value)> {
    let mut parts = assertion.split('.');
    let mut json = || serde_json::from_slice(&decode_url_safe(parts.next()?).ok()?).ok();
    let (header, claims) = (json()?, json()?);
    let signature = parts.next().filter(|signature| !signature.is_empty())?;
    (decode_url_safe(signature).is_ok() && parts.next().is_none()).then_some((header, claims))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(pairs: &[(&str, &str)]) -> Result<Uuid, u32> {
        let mut form: HashMap<String, String> = HashMap::from([
            ("grant_type".into(), "client_credentials".into()),
            ("client_id".into(), "app".into()),
            ("scope".into(), "https://127.0.0.1:1/.default".into()),
        ]);
        form.extend(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let tenant = Uuid::from_u128(7).to_string();
        Tokens::new("app", "secret", 60).judge(&tenant, &form).map_err(|refusal| refusal.1)
    }

    #[test]
    fn the_secret_and_the_form_are_checked() {
        assert!(judge(&[("client_secret", "secret")]).is_ok());
        assert_eq!(judge(&[("client_secret", "other")]), Err(7_000_215));
        assert_eq!(judge(&[]), Err(7_000_218));
        assert_eq!(judge(&[("client_secret", "secret"), ("client_id", "x")]), Err(700_016));
        assert_eq!(judge(&[("client_secret", "secret"), ("scope", "User.Read")]), Err(70_011));
        assert_eq!(judge(&[("client_secret", "secret"), ("grant_type", "password")]), Err(70_003));
    }

    #[test]
    fn an_assertion_needs_its_parts() {
        // {"alg":"PS256"} and {"alg":"none"}; {"aud":"a","iss":"b","sub":"b","exp":9999999999} and one without exp.
        let (strong, none) = ("eyJhbGciOiJQUzI1NiJ9", "eyJhbGciOiJub25lIn0");
        let whole = "eyJhdWQiOiJhIiwiaXNzIjoiYiIsInN1YiI6ImIiLCJleHAiOjk5OTk5OTk5OTl9";
        let endless = "eyJhdWQiOiJhIiwiaXNzIjoiYiIsInN1YiI6ImIifQ";
        let with =
            |assertion: String| judge(&[("client_assertion_type", ASSERTION_TYPE), ("client_assertion", &assertion)]);
        assert!(with(format!("{strong}.{whole}.c2ln")).is_ok());
        assert_eq!(with(format!("{none}.{whole}.c2ln")), Err(50_027));
        assert_eq!(with(format!("{strong}.{endless}.c2ln")), Err(50_027));
        assert_eq!(with(format!("{strong}.{whole}.")), Err(50_027));
        assert_eq!(with("nonsense".into()), Err(50_027));
    }

    #[test]
    fn a_token_belongs_to_its_tenant_until_it_is_over() {
        let tokens = Tokens::new("app", "secret", 60);
        let tenant = Uuid::from_u128(7);
        let header = format!("Bearer {}", tokens.issue(tenant, 60, false));
        assert_eq!(tokens.check(Some(&header)), Bearer::Tenant(tenant));
        assert_eq!(tokens.check(Some("Bearer foreign")), Bearer::Unknown);
        assert_eq!(tokens.check(None), Bearer::Unknown);
        tokens.expire(Some(Uuid::from_u128(8)));
        assert_eq!(tokens.check(Some(&header)), Bearer::Tenant(tenant));
        tokens.expire(None);
        assert_eq!(tokens.check(Some(&header)), Bearer::Expired);
    }
}
