//! Ids on the command line, which may be shortened to a unique prefix.

use std::str::FromStr;

use uuid::Uuid;

use super::CliError;
use crate::store::Store;

/// First digits of an id, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IdPrefix {
    first: Uuid,
    last: Uuid,
}

impl FromStr for IdPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let fits = (4..=32).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let id = |filler: &str| {
            let filled = format!("{digits}{}", filler.repeat(32_usize.saturating_sub(digits.len())));
            Uuid::try_parse(&filled).map_err(|error| error.to_string())
        };
        if !fits {
            return Err("expected an id, or at least its first 4 digits".to_owned());
        }
        Ok(Self { first: id("0")?, last: id("f")? })
    }
}

impl IdPrefix {
    /// The run that this names.
    pub(super) async fn run(self, store: &Store) -> Result<Uuid, CliError> {
        if self.first == self.last {
            return Ok(self.first);
        }
        let found = store.run_ids_between(self.first, self.last).await?;
        let none =
            || CliError::Failed("no run id starts with these digits; `inventoryd runs list` lists runs".to_owned());
        self.only(&found, none)
    }

    /// The registered tenant that this names.
    pub(super) async fn tenant(self, store: &Store) -> Result<Uuid, CliError> {
        if self.first == self.last {
            return Ok(self.first);
        }
        let mut found = store.tenant_ids().await?;
        found.retain(|id| (self.first..=self.last).contains(id));
        let none = || {
            CliError::Failed("no tenant id starts with these digits; `inventoryd tenant list` lists tenants".to_owned())
        };
        self.only(&found, none)
    }

    /// As [`Self::tenant`], and an error for a tenant that is not registered.
    pub(super) async fn registered_tenant(self, store: &Store) -> Result<Uuid, CliError> {
        let tenant_id = self.tenant(store).await?;
        match store.tenant_credential(tenant_id).await? {
            Some(_) => Ok(tenant_id),
            None => Err(unknown_tenant(tenant_id)),
        }
    }

    fn only(self, found: &[Uuid], none: impl FnOnce() -> CliError) -> Result<Uuid, CliError> {
        match found {
            [] => Err(none()),
            [id] => Ok(*id),
            several => {
                let several: Vec<String> = several.iter().map(Uuid::to_string).collect();
                Err(CliError::Failed(format!("several ids start with these digits: {}", several.join(", "))))
            }
        }
    }
}

/// Error for a tenant that is not registered.
pub(super) fn unknown_tenant(tenant_id: Uuid) -> CliError {
    CliError::Failed(format!(
        "tenant {tenant_id} is not registered; register it with `inventoryd tenant add {tenant_id}`"
    ))
}

/// Error for a run that does not exist.
pub(super) fn unknown_run(run_id: Uuid) -> CliError {
    CliError::Failed(format!("run {run_id} not found; `inventoryd runs list` lists runs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_range_of_ids() {
        let whole: IdPrefix = "0193a1b2-c3d4-7000-8000-000000000001".parse().unwrap();
        assert_eq!(whole.first, whole.last);
        let short: IdPrefix = "0193a1b2-c".parse().unwrap();
        assert!((short.first..=short.last).contains(&whole.first));
        assert!(!(short.first..=short.last).contains(&Uuid::nil()));
        for wrong in
            ["", "019", "no-id-here", "0193a1b2-c3d4-7000-8000-0000000000011", "0193a1b2c3d4700080000000000000011"]
        {
            assert!(wrong.parse::<IdPrefix>().is_err(), "{wrong}");
        }
    }
}
