//! The schema: migrated by `inventoryd migrate`, checked by everything else.

use std::cmp;
use std::sync::atomic::Ordering;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::session::{PINNED_FOR_MIGRATION, ServerProperties, is_tested};
use super::{Store, StoreError};
use crate::domain::catalog::Catalog;

static MIGRATIONS: Migrator = sqlx::migrate!();

impl Store {
    /// Brings the schema to this version, on a connection without time limits.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let options = (*self.control.connect_options()).clone().options(PINNED_FOR_MIGRATION.iter().copied());
        let mut connection: PgConnection = options.connect().await?;
        ServerProperties::read(&mut connection).await?.check()?;
        let migrated = MIGRATIONS.run(&mut connection).await;
        connection.close().await?;
        migrated.map_err(migration_error)
    }

    /// Checks that the server is suitable and that the schema is the one of this version; returns warnings about the server.
    pub async fn check_schema(&self) -> Result<Vec<&'static str>, StoreError> {
        let mut connection = self.control_connection().await?;
        let server = ServerProperties::read(&mut connection).await?;
        server.check()?;
        let found = sqlx::query!(
            r#"select to_regclass('_sqlx_migrations') is not null as "migrated!", current_user::text as "role!",
                      current_database()::text as "database!", current_setting('search_path') as "search_path!""#
        )
        .fetch_one(&mut *connection)
        .await?;
        if !found.migrated {
            return Err(StoreError::Schema(format!(
                "the database {:?} has no inventory schema that the role {:?} finds with search_path {:?}: \
                 run `inventoryd migrate` with the same version, or set the search_path of the role to the schema of the inventory",
                found.database, found.role, found.search_path
            )));
        }
        let applied = "select version, checksum from _sqlx_migrations where success order by version desc limit 1";
        let applied: Option<(i64, Vec<u8>)> = sqlx::query_as(applied).fetch_optional(&mut *connection).await?;
        let mut warnings = server.warnings();
        if let Compared::Newer(version) = compare(applied)? {
            let oldest = sqlx::query_scalar!(r#"select inventory_oldest_migration() as "oldest!""#);
            let (oldest, newest) = (oldest.fetch_one(&mut *connection).await?, newest_migration());
            if oldest > newest {
                return Err(StoreError::Schema(format!(
                    "the database schema has version {version} and serves daemons from version {oldest} on, this daemon has \
                     {newest}: upgrade this daemon"
                )));
            }
            warnings.push(
                "a newer version has migrated the database schema, which serves this daemon too: upgrade this daemon",
            );
        }
        Ok(warnings)
    }

    /// Version of the server of the latest connection, and whether it is one that was tested; `None` before the first one.
    #[must_use]
    pub fn server_version(&self) -> Option<(String, bool)> {
        let number = self.origin.server.load(Ordering::Relaxed);
        let version = || (format!("{}.{}", number / 10_000, number % 10_000), is_tested(number));
        (number > 0).then(version)
    }

    /// Records which policy types this daemon lists, so that readers recognise items of types that no daemon lists any more.
    pub async fn publish_catalog(&self, catalog: &Catalog) -> Result<(), StoreError> {
        let (mut keys, mut labels, mut categories) = (Vec::new(), Vec::new(), Vec::new());
        for policy_type in catalog.types() {
            keys.push(policy_type.key.clone());
            labels.push(policy_type.label.clone());
            categories.push(policy_type.category.clone());
        }
        // In the order of the key, so that replicas that start together cannot deadlock.
        let published = sqlx::query!(
            "with supported as (
               insert into policy_types as p (policy_type, label, category, supported)
               select u.policy_type, u.label, u.category, true
                 from unnest($1::text[], $2::text[], $3::text[]) u(policy_type, label, category) order by 1
               on conflict (policy_type) do update set label = excluded.label, category = excluded.category, supported = true
                where (p.label, p.category, p.supported) is distinct from (excluded.label, excluded.category, true))
             update policy_types set supported = false where supported and policy_type <> all($1)",
            &keys,
            &labels,
            &categories
        )
        .execute(&self.control);
        self.with_timeout(async { Ok(published.await?) }).await?;
        Ok(())
    }
}

/// Result of a comparison with the migrations of this version.
#[derive(Debug, PartialEq, Eq)]
enum Compared {
    Same,
    /// Migrated by a newer version, to this migration.
    Newer(i64),
}

/// Compares the newest applied migration with the newest of this version. The checksum detects a schema of another program, or
/// of an unreleased version, that happens to have the same number.
fn compare(applied: Option<(i64, Vec<u8>)>) -> Result<Compared, StoreError> {
    let needed = newest_migration();
    let (version, checksum) = applied.unwrap_or_default();
    match version.cmp(&needed) {
        cmp::Ordering::Equal if is_ours(version, &checksum) => Ok(Compared::Same),
        cmp::Ordering::Equal => Err(migration_error(MigrateError::VersionMismatch(version))),
        cmp::Ordering::Greater => Ok(Compared::Newer(version)),
        cmp::Ordering::Less => Err(StoreError::Schema(format!(
            "the database schema has version {version}, this daemon needs {needed}: run `inventoryd migrate` with the same \
             version"
        ))),
    }
}

fn is_ours(version: i64, checksum: &[u8]) -> bool {
    MIGRATIONS.iter().any(|known| known.version == version && *known.checksum == *checksum)
}

fn newest_migration() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Error for a failed migration, with its remedy.
fn migration_error(error: MigrateError) -> StoreError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => StoreError::Database(error),
        MigrateError::VersionMissing(version) => StoreError::Schema(format!(
            "the database has migration {version}, which this version does not know: run `inventoryd migrate` of the newer \
             version that made it"
        )),
        MigrateError::VersionMismatch(version) => StoreError::Schema(format!(
            "migration {version} differs from the one that was applied to the database, which was made by an unreleased \
             version: create a new database, then run `inventoryd migrate`"
        )),
        MigrateError::Dirty(version) => StoreError::Schema(format!(
            "migration {version} was interrupted: restore the database from a backup, then run `inventoryd migrate`"
        )),
        other => StoreError::Schema(format!("the schema could not be migrated: {other}")),
    }
}
