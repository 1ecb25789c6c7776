//! Microsoft national clouds and their documented endpoints.

use schemars::JsonSchema;
use serde::Deserialize;

/// Microsoft national cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cloud {
    /// Worldwide, and Microsoft 365 GCC.
    Global,
    /// US Government L4 (GCC High).
    UsgovL4,
    /// US Government L5 (DoD).
    UsgovL5,
    /// China, operated by 21Vianet.
    China,
    /// Cloud given by `base_url` and `authority`.
    Custom,
}

impl Cloud {
    /// Documented root of Microsoft Graph; none for a custom cloud.
    #[must_use]
    pub const fn base_url(self) -> Option<&'static str> {
        match self {
            Self::Global => Some("https://graph.microsoft.com"),
            Self::UsgovL4 => Some("https://graph.microsoft.us"),
            Self::UsgovL5 => Some("https://dod-graph.microsoft.us"),
            Self::China => Some("https://microsoftgraph.chinacloudapi.cn"),
            Self::Custom => None,
        }
    }

    /// Documented root of the token service; none for a custom cloud.
    #[must_use]
    pub const fn authority(self) -> Option<&'static str> {
        match self {
            Self::Global => Some("https://login.microsoftonline.com"),
            Self::UsgovL4 | Self::UsgovL5 => Some("https://login.microsoftonline.us"),
            Self::China => Some("https://login.chinacloudapi.cn"),
            Self::Custom => None,
        }
    }
}
