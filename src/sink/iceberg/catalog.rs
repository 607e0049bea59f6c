//! The boundary to catalogs: what names a table's current metadata.
//!
//! Owns: the trait and the values that cross it. Invariant of every implementation: a commit happens only if every table
//! still is what was read; a catalog that says it is atomic applies all changes or none.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use iceberg::TableCreation;
use iceberg::spec::{TableMetadata, TableMetadataBuilder};

use crate::sink::Error;

/// `namespace.table`; the namespace may have several levels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableName {
    pub namespace: String,
    pub name: String,
}

impl TableName {
    pub fn parse(text: &str) -> Result<TableName, Error> {
        match text.rsplit_once('.') {
            Some((namespace, name)) if text.split('.').all(|part| !part.is_empty()) && !text.contains('/') => {
                Ok(TableName { namespace: namespace.to_string(), name: name.to_string() })
            }
            _ => Err(Error::fatal(format!("table name {text:?} is not of the form namespace.table"))),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.namespace, self.name)
    }
}

/// A table as the catalog had it at one moment.
#[derive(Clone, Debug)]
pub struct LoadedTable {
    pub metadata_location: String,
    pub metadata: Arc<TableMetadata>,
}

/// The next metadata of one table, made from `base`.
#[derive(Debug)]
pub struct TableChange {
    pub table: TableName,
    pub base: LoadedTable,
    pub metadata: TableMetadata,
}

impl TableChange {
    pub fn new(
        table: &TableName,
        base: &LoadedTable,
        change: impl FnOnce(TableMetadataBuilder) -> iceberg::Result<TableMetadataBuilder>,
    ) -> iceberg::Result<TableChange> {
        let builder = base.metadata.as_ref().clone().into_builder(Some(base.metadata_location.clone()));
        let built = change(builder)?.build()?;
        Ok(TableChange { table: table.clone(), base: base.clone(), metadata: built.metadata })
    }
}

#[derive(Debug)]
pub enum CommitError {
    /// Someone else has changed a table since it was read; nothing was done.
    Conflict(String),
    Failed(Error),
}

#[async_trait]
pub trait Catalog: fmt::Debug + Send + Sync {
    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error>;

    /// Creates the table, its namespace too, or returns the one that someone else has just created.
    /// `creation` has no location: the catalog decides.
    async fn create(&self, table: &TableName, creation: TableCreation) -> Result<LoadedTable, Error>;

    async fn commit(&self, changes: &[TableChange]) -> Result<(), CommitError>;
}

/// What an error of the `iceberg` crate asks of the caller: data that cannot be understood stays so.
pub fn iceberg_error(action: &str, table: &dyn fmt::Display, error: iceberg::Error) -> Error {
    let message = format!("cannot {action} table {table}: {error}");
    match error.kind() {
        iceberg::ErrorKind::DataInvalid | iceberg::ErrorKind::FeatureUnsupported => Error::fatal(message),
        _ => Error::transient(message),
    }
}
