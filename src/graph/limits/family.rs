//! Families of lists that Graph counts against the same limit.

use crate::domain::catalog::Collection;

/// Path of everything that may count against Conditional Access's limit, which is the lowest.
const CONDITIONAL_ACCESS: &str = "identity/conditionalAccess";

/// Lists that Graph counts against the same limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::graph) enum Family {
    /// Policies and apps: every Intune list without a documented limit of its own.
    Intune,
    /// Devices and scripts.
    Devices,
    /// Conditional Access: policies, named locations and whatever else is below its path.
    ConditionalAccess,
    /// Lists outside Intune; Graph publishes no limit for them.
    Graph,
}

impl Family {
    pub(super) const ALL: [Self; 4] = [Self::Intune, Self::Devices, Self::ConditionalAccess, Self::Graph];

    /// Family of a list, by its contract's `throttle`. Graph does not document what all lists of Conditional Access count
    /// against: they are paced by its low limit, whatever their contract says.
    pub(in crate::graph) fn of(collection: &Collection) -> Self {
        let path = collection.parent.as_ref().unwrap_or(&collection.path);
        if path.starts_with(CONDITIONAL_ACCESS) { Self::ConditionalAccess } else { Self::named(&collection.throttle) }
    }

    fn named(throttle: &str) -> Self {
        match throttle {
            "devices" => Self::Devices,
            "identityprotection-ca" => Self::ConditionalAccess,
            "graph-default" => Self::Graph,
            _ => Self::Intune,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Intune => "intune",
            Self::Devices => "devices",
            Self::ConditionalAccess => "conditional_access",
            Self::Graph => "graph",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::catalog::Catalog;

    #[test]
    fn every_family_of_the_contracts_has_its_limits() {
        for (throttle, family) in [
            ("device-configuration", Family::Intune),
            ("intune-default", Family::Intune),
            ("devices", Family::Devices),
            ("identityprotection-ca", Family::ConditionalAccess),
            ("graph-default", Family::Graph),
        ] {
            assert_eq!(Family::named(throttle), family, "{throttle}");
        }
    }

    #[test]
    fn everything_of_conditional_access_is_paced_by_its_limit() {
        let catalog = Catalog::built_in();
        let families = catalog.types().map(|policy_type| (&policy_type.path, catalog.collection_of(policy_type)));
        let paced: Vec<_> = families.filter(|(path, _)| path.contains("conditionalAccess")).collect();
        assert_eq!(paced.len(), 3);
        for (path, collection) in paced {
            assert_eq!(Family::of(collection), Family::ConditionalAccess, "{path}");
        }
    }
}
