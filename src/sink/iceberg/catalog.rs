//! The boundary to catalogs: what names a table's current metadata.
//!
//! Owns: the trait and the values that cross it. Invariant of every implementation: a commit happens only if every table
//! still is what was read; a catalog that says it is atomic applies all changes or none.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use iceberg::spec::{MAIN_BRANCH, TableMetadata, TableMetadataBuilder};
use iceberg::{TableCreation, TableRequirement, TableUpdate};

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

/// What a commit does to one table, in both forms that catalogs take: as updates with what they require, for catalogs that
/// make the metadata themselves (REST), and as the next metadata, for those that leave it to the client (SQLite).
///
/// Made by [`TableChange::new`] from the table as it was read, and from nothing else: what a builder does is recorded on
/// the way, so the two forms cannot differ, and what has to hold of the table follows from the updates.
///
/// ```ignore
/// let change = TableChange::new(&name, &loaded, |builder| builder.set_branch_snapshot(snapshot, MAIN_BRANCH))?;
/// catalog.commit(&[change]).await?;
/// ```
#[derive(Debug)]
pub struct TableChange {
    pub table: TableName,
    pub base: LoadedTable,
    pub updates: Vec<TableUpdate>,
    /// `base` with the updates applied.
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
        Ok(TableChange { table: table.clone(), base: base.clone(), updates: built.changes, metadata: built.metadata })
    }

    /// What must still be as it was read for the updates to apply: the table itself and the head of main always, besides
    /// what each update touches. Nothing in it guards a property: two changes of properties alone do not conflict.
    pub fn requirements(&self) -> Vec<TableRequirement> {
        let base = &self.base.metadata;
        let unmoved = |reference: &str| TableRequirement::RefSnapshotIdMatch {
            r#ref: reference.to_string(),
            snapshot_id: base.snapshot_for_ref(reference).map(|snapshot| snapshot.snapshot_id()),
        };
        let mut required = vec![TableRequirement::UuidMatch { uuid: base.uuid() }, unmoved(MAIN_BRANCH)];
        for update in &self.updates {
            required.extend(match update {
                TableUpdate::SetSnapshotRef { ref_name, .. } | TableUpdate::RemoveSnapshotRef { ref_name } => {
                    vec![unmoved(ref_name)]
                }
                TableUpdate::AddSchema { .. } => {
                    vec![TableRequirement::LastAssignedFieldIdMatch { last_assigned_field_id: base.last_column_id() }]
                }
                TableUpdate::SetCurrentSchema { .. } => {
                    vec![TableRequirement::CurrentSchemaIdMatch { current_schema_id: base.current_schema_id() }]
                }
                _ => Vec::new(),
            });
        }
        let mut unique: Vec<TableRequirement> = Vec::with_capacity(required.len());
        for requirement in required {
            if !unique.contains(&requirement) {
                unique.push(requirement);
            }
        }
        unique
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
    /// Whether several changes in one commit all happen or none does. Where not, a commit is asked for one at a time.
    fn commits_together(&self) -> bool;

    /// Whether a commit that changes properties alone conflicts with another one. Where not, a late request of a process
    /// that has been replaced could set a property back, and what must not be set back needs a snapshot along with it.
    fn guards_properties(&self) -> bool;

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
