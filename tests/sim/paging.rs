//! Opaque next links, bound to one tenant and one query, and percent-encoded twice as those of Intune. A client that
//! splits or decodes them, or uses them for another tenant, gets an error.

use uuid::Uuid;

use super::seed;
use super::text::{percent_decode, percent_encode};

const RID: &str = "+RID:~";

/// Start of a page, and its number within the listing (from 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Position {
    /// The place of the first object.
    pub start: u32,
    /// Number of requests that led here.
    pub page: u32,
}

/// Request that a token is bound to.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// The seed of the simulator.
    pub seed: u64,
    /// The tenant of the bearer token.
    pub tenant: Uuid,
    /// The concrete path.
    pub path: &'a str,
    /// The raw query without its token.
    pub query: &'a str,
}

impl Position {
    /// The first page.
    pub const FIRST: Position = Position { start: 0, page: 1 };

    /// The token for this place, encoded for a query.
    pub fn token(self, binding: &Binding<'_>) -> String {
        percent_encode(&percent_encode(&self.plain(binding)))
    }

    /// Reads a token exactly as it appears in the query.
    pub fn read(raw: &str, binding: &Binding<'_>) -> Option<Position> {
        let position = Position::peek(raw)?;
        (position.token(binding) == raw).then_some(position)
    }

    /// Reads the place without checking whose token it is.
    pub fn peek(raw: &str) -> Option<Position> {
        let plain = percent_decode(&percent_decode(raw));
        let rid = &plain[plain.find(RID)? + RID.len()..];
        let start = u32::from_str_radix(rid.get(16..24)?, 16).ok()?;
        let page = u32::from_str_radix(rid.get(24..32)?, 16).ok()?;
        Some(Position { start, page })
    }

    fn plain(self, binding: &Binding<'_>) -> String {
        let place = (u64::from(self.start) << 32) | u64::from(self.page);
        let key = seed::collection_key(binding.seed, binding.tenant, binding.path);
        let seal = seed::fold_text(seed::mix(key ^ place), binding.query);
        format!(
            "[cosmosdb][{{\"compositeToken\":{{\"token\":\"{RID}{seal:016x}{:08x}{:08x}#RT:{}\",\"range\":\
             {{\"min\":\"05C1DFFFFFFFFC\",\"max\":\"FF\"}}}},\"resumeValues\":[\"{} {:04}\"],\"skipCount\":0}}]",
            self.start,
            self.page,
            self.page,
            seed::tenant_word(binding.seed, binding.tenant).to_lowercase(),
            self.start,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: Binding<'_> = Binding { seed: 1, tenant: Uuid::from_u128(7), path: "beta/a", query: "$top=5" };

    #[test]
    fn a_token_comes_back_only_untouched() {
        let position = Position { start: 25, page: 2 };
        let token = position.token(&BINDING);
        assert!(token.starts_with("%255Bcosmosdb%255D"));
        assert_eq!(Position::read(&token, &BINDING), Some(position));
        assert_eq!(Position::read(&percent_decode(&token), &BINDING), None);
        assert_eq!(Position::read(&token.to_lowercase(), &BINDING), None);
    }

    #[test]
    fn a_token_is_worth_nothing_for_another_tenant_path_or_query() {
        let token = Position { start: 25, page: 2 }.token(&BINDING);
        let strangers = [
            Binding { tenant: Uuid::from_u128(8), ..BINDING },
            Binding { path: "beta/b", ..BINDING },
            Binding { query: "$top=6", ..BINDING },
            Binding { seed: 2, ..BINDING },
        ];
        for stranger in strangers {
            assert_eq!(Position::read(&token, &stranger), None);
        }
    }
}
