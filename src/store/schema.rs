//! The schema: migrated by `inventoryd migrate`, checked by everything else.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::session::{PINNED_FOR_MIGRATION, ServerProperties};
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
        let mut connection = self.control.acquire().await?;
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
        let applied = sqlx::query_scalar::<_, Option<i64>>("select max(version) from _sqlx_migrations where success")
            .fetch_one(&mut *connection)
            .await?
            .unwrap_or_default();
        let needed = newest_version();
        if applied == needed {
            return Ok(server.warnings());
        }
        let cure = if applied < needed {
            "run `inventoryd migrate` with the same version"
        } else {
            "a newer version has migrated it: upgrade this daemon"
        };
        Err(StoreError::Schema(format!(
            "the database schema has version {applied}, this daemon needs {needed}: {cure}"
        )))
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

fn newest_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default()
}

/// Each failure has a cure of its own.
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
