//! Whether a catalog, and the storage that it names, take what Floe will write: tried out on the tables that are there.
//!
//! Leaves nothing behind: the property and the object are removed again.

use iceberg::spec::TableMetadata;
use object_store::{ObjectStoreExt, PutPayload};
use uuid::Uuid;

use super::catalog::{Catalog, CommitError, TableChange, TableName, iceberg_error};
use super::storage::TableStorage;
use super::{CatalogConfig, TableSpec, open_read_only};
use crate::error::chain;
use crate::sink::Error;

const PROPERTY: &str = "floe.probe";
const ATTEMPTS: u32 = 10;

/// What became of a property that was set on a table.
#[derive(Debug, PartialEq, Eq)]
pub enum Properties {
    Kept,
    /// By the catalog or its permissions: why.
    Refused(String),
}

/// What a catalog has said and done.
#[derive(Debug)]
pub struct Probed {
    /// Whether several tables are committed in one request.
    pub together: bool,
    /// By table that is there: what Floe may do to it, or why it may not.
    pub tables: Vec<(String, Result<String, String>)>,
}

/// Tries the tables of a pipeline out. None where there is no catalog yet.
pub async fn probe(catalog: &CatalogConfig, specs: &[TableSpec]) -> Result<Option<Probed>, Error> {
    let storage = TableStorage::default();
    let Some(catalog) = open_read_only(catalog, &storage).await? else { return Ok(None) };
    let mut tables = Vec::new();
    for spec in specs {
        let name = TableName::parse(&spec.name)?;
        let Some(loaded) = catalog.load(&name).await? else { continue };
        let mut found = match properties(catalog.as_ref(), &name).await? {
            Properties::Kept => Ok("keeps properties".to_string()),
            Properties::Refused(why) => {
                Ok(format!("keeps no property of Floe's ({why}): a tag on the last snapshot carries the marker"))
            }
        };
        if let Err(e) = write(&storage, &loaded.metadata).await {
            let location = loaded.metadata.location();
            found = Err(format!(
                "{location} cannot be written: {e}; check the credentials and the endpoint of the storage"
            ));
        }
        tables.push((spec.name.clone(), found));
    }
    Ok(Some(Probed { together: catalog.commits_together(), tables }))
}

/// Sets a property, looks whether it is there, and removes it.
pub(super) async fn properties(catalog: &dyn Catalog, table: &TableName) -> Result<Properties, Error> {
    let value = Uuid::new_v4().to_string();
    let set = [(PROPERTY.to_string(), value.clone())];
    if let Some(why) = change(catalog, table, |b| b.set_properties(set.clone().into())).await? {
        return Ok(Properties::Refused(why));
    }
    let there = load(catalog, table).await?.metadata.properties().get(PROPERTY) == Some(&value);
    if !there {
        return Ok(Properties::Refused("it was accepted and is not there".into()));
    }
    match change(catalog, table, |b| b.remove_properties(&[PROPERTY.to_string()])).await? {
        None => Ok(Properties::Kept),
        Some(why) => Ok(Properties::Refused(format!("it cannot be removed again: {why}"))),
    }
}

async fn load(catalog: &dyn Catalog, table: &TableName) -> Result<super::LoadedTable, Error> {
    catalog.load(table).await?.ok_or_else(|| Error::fatal(format!("table {table} is gone")))
}

/// Why the catalog refuses, if it does.
async fn change(
    catalog: &dyn Catalog,
    table: &TableName,
    change: impl Fn(iceberg::spec::TableMetadataBuilder) -> iceberg::Result<iceberg::spec::TableMetadataBuilder>,
) -> Result<Option<String>, Error> {
    let mut conflict = String::new();
    for _ in 0..ATTEMPTS {
        let loaded = load(catalog, table).await?;
        let change = TableChange::new(table, &loaded, &change).map_err(|e| iceberg_error("try out", table, e))?;
        match catalog.commit(&[change]).await {
            Ok(()) => return Ok(None),
            Err(CommitError::Conflict(message)) => conflict = message,
            Err(CommitError::Failed(Error::Fatal { message })) => return Ok(Some(message)),
            Err(CommitError::Failed(error)) => return Err(error),
        }
    }
    Err(Error::transient(format!("table {table}: other writers were faster in {ATTEMPTS} attempts: {conflict}")))
}

async fn write(storage: &TableStorage, metadata: &TableMetadata) -> Result<(), Error> {
    let location = format!("{}/metadata/.floe-check-{}", metadata.location().trim_end_matches('/'), Uuid::new_v4());
    let failed = |e: &dyn std::error::Error| Error::transient(chain(e));
    let (store, path) = storage.locate(&location).map_err(|e| failed(&e))?;
    store.put(&path, PutPayload::from_static(b"floe check")).await.map_err(|e| failed(&e))?;
    store.delete(&path).await.map_err(|e| failed(&e))
}
