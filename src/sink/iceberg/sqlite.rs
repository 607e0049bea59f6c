//! The embedded catalog: one SQLite file in the layout of PyIceberg's `SqlCatalog` and Java's JDBC catalog.
//!
//! Owns: which metadata file is current, and that all tables of a batch change in one SQL transaction or none does. Other
//! programs open the same file: `SqlCatalog("floe", uri="sqlite:///data/catalog.db", warehouse=…)` in PyIceberg. The
//! catalog name is part of every key, so it has to be [`CATALOG_NAME`] there too.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::try_join_all;
use iceberg::io::FileIO;
use iceberg::spec::{TableMetadata, TableMetadataBuilder};
use iceberg::{MetadataLocation, TableCreation};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior, params};
use uuid::Uuid;

use super::catalog::{Catalog, CommitError, LoadedTable, TableChange, TableName, iceberg_error};
use crate::failpoint;
use crate::sink::Error;

/// The name that other programs give when they open the catalog.
pub const CATALOG_NAME: &str = "floe";

const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

const LAYOUT: &str = "
CREATE TABLE IF NOT EXISTS iceberg_tables (
    catalog_name VARCHAR(255) NOT NULL,
    table_namespace VARCHAR(255) NOT NULL,
    table_name VARCHAR(255) NOT NULL,
    metadata_location VARCHAR(1000),
    previous_metadata_location VARCHAR(1000),
    iceberg_type VARCHAR(5),
    PRIMARY KEY (catalog_name, table_namespace, table_name)
);
CREATE TABLE IF NOT EXISTS iceberg_namespace_properties (
    catalog_name VARCHAR(255) NOT NULL,
    namespace VARCHAR(255) NOT NULL,
    property_key VARCHAR(255) NOT NULL,
    property_value VARCHAR(1000) NOT NULL,
    PRIMARY KEY (catalog_name, namespace, property_key)
);";

#[derive(Clone, Debug)]
pub struct SqliteCatalog {
    path: PathBuf,
    warehouse: String,
    file_io: FileIO,
    connection: Arc<Mutex<Connection>>,
    /// Catalogs of older programs lack the column `iceberg_type`.
    typed: bool,
    /// The metadata last seen of every table. A metadata file never changes, so one that is still current need not be
    /// read and parsed again: it grows with every snapshot that the table keeps.
    seen: Arc<Mutex<HashMap<TableName, LoadedTable>>>,
}

impl SqliteCatalog {
    pub async fn open(path: &Path, warehouse: &str, file_io: FileIO) -> Result<SqliteCatalog, Error> {
        let warehouse = crate::storage::open(warehouse).map_err(|e| Error::fatal(format!("warehouse: {e}")))?.url;
        let path = path.to_path_buf();
        blocking(move || {
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                crate::storage::create_folders(folder).map_err(|e| {
                    Error::transient(format!("catalog {}: cannot create its folder: {e}", path.display()))
                })?;
            }
            let (connection, typed) = connect(&path).map_err(|e| sql_error(&path, "open it", e))?;
            Ok(SqliteCatalog {
                path,
                warehouse,
                file_io,
                connection: Arc::new(Mutex::new(connection)),
                typed,
                seen: Arc::default(),
            })
        })
        .await
    }

    /// A catalog to look at only. None where there is no catalog yet.
    pub async fn open_read_only(path: &Path, warehouse: &str, file_io: FileIO) -> Result<Option<SqliteCatalog>, Error> {
        if !path.exists() {
            return Ok(None);
        }
        let (path, warehouse) = (path.to_path_buf(), warehouse.to_string());
        blocking(move || {
            let found = connect_read_only(&path).map_err(|e| sql_error(&path, "read it", e))?;
            Ok(found.map(|(connection, typed)| SqliteCatalog {
                path,
                warehouse,
                file_io,
                connection: Arc::new(Mutex::new(connection)),
                typed,
                seen: Arc::default(),
            }))
        })
        .await
    }

    async fn with_connection<T: Send + 'static, E: From<Error> + Send + 'static>(
        &self,
        work: impl FnOnce(&SqliteCatalog, &mut Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let this = self.clone();
        blocking(move || {
            let mut connection = this.connection.lock().unwrap_or_else(PoisonError::into_inner);
            work(&this, &mut connection)
        })
        .await
    }

    async fn metadata_location(&self, table: &TableName) -> Result<Option<String>, Error> {
        let table = table.clone();
        self.with_connection(move |this, connection| {
            // Rows of another type, such as views, share the names of tables but are none.
            let only_tables = if this.typed { "AND (iceberg_type = 'TABLE' OR iceberg_type IS NULL)" } else { "" };
            let location: Option<Option<String>> = connection
                .prepare_cached(&format!(
                    "SELECT metadata_location FROM iceberg_tables
                     WHERE catalog_name = ? AND table_namespace = ? AND table_name = ? {only_tables}"
                ))
                .and_then(|mut query| {
                    query.query_row(params![CATALOG_NAME, table.namespace, table.name], |row| row.get(0)).optional()
                })
                .map_err(|e| sql_error(&this.path, &format!("look up table {table}"), e))?;
            Ok(location.flatten())
        })
        .await
    }

    /// Writes metadata under a name that nothing knows yet.
    async fn write_metadata(
        &self,
        table: &TableName,
        previous: Option<&str>,
        metadata: &TableMetadata,
    ) -> Result<String, Error> {
        let location =
            next_metadata_location(previous, metadata).map_err(|e| iceberg_error("name the metadata of", table, e))?;
        metadata
            .write_to(&self.file_io, &location)
            .await
            .map_err(|e| iceberg_error("write the metadata of", table, e))?;
        Ok(location.to_string())
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<TableName, LoadedTable>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Best effort: files that no catalog has ever named.
    async fn forget(&self, locations: &[String]) {
        for location in locations {
            if let Err(error) = self.file_io.delete(location).await {
                tracing::debug!(location, %error, "could not delete unused table metadata");
            }
        }
    }
}

#[async_trait]
impl Catalog for SqliteCatalog {
    fn commits_together(&self) -> bool {
        true
    }

    fn guards_properties(&self) -> bool {
        true
    }

    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        let Some(metadata_location) = self.metadata_location(table).await? else { return Ok(None) };
        if let Some(seen) = self.seen().get(table).filter(|seen| seen.metadata_location == metadata_location) {
            return Ok(Some(seen.clone()));
        }
        let metadata = TableMetadata::read_from(&self.file_io, &metadata_location)
            .await
            .map_err(|e| iceberg_error("read the metadata of", table, e))?;
        let loaded = LoadedTable { metadata_location, metadata: Arc::new(metadata) };
        self.seen().insert(table.clone(), loaded.clone());
        Ok(Some(loaded))
    }

    async fn create(&self, table: &TableName, creation: TableCreation) -> Result<LoadedTable, Error> {
        let location = format!("{}/{}/{}", self.warehouse, table.namespace, table.name);
        let metadata =
            TableMetadataBuilder::from_table_creation(TableCreation { location: Some(location), ..creation })
                .and_then(|builder| builder.build())
                .map_err(|e| iceberg_error("create", table, e))?
                .metadata;
        let metadata_location = self.write_metadata(table, None, &metadata).await?;

        let (name, location) = (table.clone(), metadata_location.clone());
        let created = self.with_connection(move |this, connection| insert(this, connection, &name, &location)).await?;
        if !created {
            self.forget(&[metadata_location]).await;
            return self.load(table).await?.ok_or_else(|| {
                Error::fatal(format!(
                    "cannot create table {table}: the catalog has something else, such as a view, of that name"
                ))
            });
        }
        Ok(LoadedTable { metadata_location, metadata: Arc::new(metadata) })
    }

    async fn commit(&self, changes: &[TableChange]) -> Result<(), CommitError> {
        let locations = try_join_all(
            changes.iter().map(|c| self.write_metadata(&c.table, Some(&c.base.metadata_location), &c.metadata)),
        )
        .await
        .map_err(CommitError::Failed)?;
        if failpoint::hit("commit.metadata_written") {
            return Err(CommitError::Failed(Error::transient("failpoint commit.metadata_written")));
        }
        let moves: Vec<Move> = changes
            .iter()
            .zip(&locations)
            .map(|(c, to)| Move { table: c.table.clone(), from: c.base.metadata_location.clone(), to: to.clone() })
            .collect();
        let outcome = self.with_connection(move |this, connection| switch(this, connection, &moves)).await;
        if let Err(CommitError::Conflict(_)) = &outcome {
            self.forget(&locations).await;
        }
        outcome?;
        for (change, metadata_location) in changes.iter().zip(locations) {
            super::metadata::remove_dropped(&self.file_io, &change.base.metadata, &change.metadata).await;
            let metadata = Arc::new(change.metadata.clone());
            self.seen().insert(change.table.clone(), LoadedTable { metadata_location, metadata });
        }
        if failpoint::hit("commit.committed") {
            return Err(CommitError::Failed(Error::indeterminate("failpoint commit.committed")));
        }
        Ok(())
    }
}

impl From<Error> for CommitError {
    fn from(error: Error) -> Self {
        CommitError::Failed(error)
    }
}

struct Move {
    table: TableName,
    from: String,
    to: String,
}

fn connect(path: &Path) -> rusqlite::Result<(Connection, bool)> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute_batch(LAYOUT)?;
    let typed = is_typed(&connection);
    Ok((connection, typed))
}

fn connect_read_only(path: &Path) -> rusqlite::Result<Option<(Connection, bool)>> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    let known: i64 =
        connection
            .query_row("SELECT count(*) FROM sqlite_master WHERE name = 'iceberg_tables'", [], |row| row.get(0))?;
    let typed = is_typed(&connection);
    Ok((known > 0).then_some((connection, typed)))
}

fn is_typed(connection: &Connection) -> bool {
    connection.prepare("SELECT iceberg_type FROM iceberg_tables LIMIT 0").is_ok()
}

/// False: the name is taken.
fn insert(this: &SqliteCatalog, connection: &mut Connection, table: &TableName, location: &str) -> Result<bool, Error> {
    let error = |e| sql_error(&this.path, &format!("create table {table}"), e);
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(error)?;
    transaction
        .execute(
            "INSERT OR IGNORE INTO iceberg_namespace_properties (catalog_name, namespace, property_key, property_value)
             VALUES (?, ?, 'exists', 'true')",
            params![CATALOG_NAME, table.namespace],
        )
        .map_err(error)?;
    let (column, value) = if this.typed { (", iceberg_type", ", 'TABLE'") } else { ("", "") };
    let rows = transaction
        .execute(
            &format!(
                "INSERT OR IGNORE INTO iceberg_tables (catalog_name, table_namespace, table_name, metadata_location{column})
                 VALUES (?, ?, ?, ?{value})"
            ),
            params![CATALOG_NAME, table.namespace, table.name, location],
        )
        .map_err(error)?;
    transaction.commit().map_err(error)?;
    Ok(rows == 1)
}

/// Points every table from its old metadata to its new one, or none of them.
fn switch(this: &SqliteCatalog, connection: &mut Connection, moves: &[Move]) -> Result<(), CommitError> {
    let error = |e| sql_error(&this.path, "commit", e);
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(error)?;
    for Move { table, from, to } in moves {
        let rows = transaction
            .execute(
                "UPDATE iceberg_tables SET metadata_location = ?, previous_metadata_location = ?
                 WHERE catalog_name = ? AND table_namespace = ? AND table_name = ? AND metadata_location = ?",
                params![to, from, CATALOG_NAME, table.namespace, table.name, from],
            )
            .map_err(error)?;
        if rows != 1 {
            // Dropping the transaction rolls back what came before.
            return Err(CommitError::Conflict(format!("table {table} is no longer at {from}")));
        }
    }
    transaction.commit().map_err(|e| {
        let path = this.path.display();
        CommitError::Failed(Error::indeterminate(format!("catalog {path}: the outcome of a commit is unknown: {e}")))
    })
}

/// `<location>/metadata/<version>-<uuid>.metadata.json`, also after a file that another program named its own way.
fn next_metadata_location(previous: Option<&str>, metadata: &TableMetadata) -> iceberg::Result<MetadataLocation> {
    let Some(previous) = previous else {
        return Ok(MetadataLocation::new_with_metadata(metadata.location(), metadata));
    };
    let file = previous.rsplit('/').next().unwrap_or_default();
    let digits: String = file.trim_start_matches('v').chars().take_while(char::is_ascii_digit).collect();
    let version = digits.parse::<u32>().unwrap_or(0).saturating_add(1);
    let location = metadata.location().trim_end_matches('/');
    Ok(MetadataLocation::from_str(&format!("{location}/metadata/{version:05}-{}.metadata.json", Uuid::new_v4()))?
        .with_new_metadata(metadata))
}

fn sql_error(path: &Path, action: &str, error: rusqlite::Error) -> Error {
    let message = format!("catalog {}: cannot {action}: {error}", path.display());
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt | ErrorCode::ReadOnly) => Error::fatal(message),
        // Busy, locked, disk full, I/O: all of these pass, or are made to pass.
        _ => Error::transient(message),
    }
}

async fn blocking<T: Send + 'static, E: From<Error> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::indeterminate(format!("a catalog operation did not end: {e}")).into()))
}
