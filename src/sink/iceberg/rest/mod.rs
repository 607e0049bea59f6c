//! A catalog behind the Iceberg REST protocol.
//!
//! Owns: what is asked of the server and what its answers mean for a table. The server makes and removes metadata files,
//! chooses locations and ids, and vends credentials for the storage. Does not own: tokens ([`auth`]), outcomes of a
//! request ([`client`]), vended credentials once they are known ([`super::vended`]).
//!
//! Invariant: every commit requires the head of main as it was read. A change that does not move main would not be held
//! back by it, which is why [`Catalog::guards_properties`] is false here.

mod auth;
mod client;
mod sigv4;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use iceberg::TableCreation;
use iceberg::spec::TableMetadata;
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use self::client::{Client, Failure, namespace_path, table_path};
use super::catalog::{Catalog, CommitError, LoadedTable, TableChange, TableName};
use super::storage::TableStorage;
use super::vended::Reload;
use crate::config::RestConfig;
use crate::failpoint;
use crate::sink::Error;

/// Iceberg's first id of a partition field.
const FIRST_PARTITION_FIELD: i32 = 1000;
const COMMIT_TRANSACTION: &str = "POST /v1/{prefix}/transactions/commit";

#[derive(Clone, Debug)]
pub struct RestCatalog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Client,
    storage: TableStorage,
    transactions: bool,
    /// Storage settings that the server gives for all tables.
    settings: HashMap<String, String>,
    this: Weak<Inner>,
}

#[derive(Deserialize)]
struct ConfigAnswer {
    #[serde(default)]
    defaults: HashMap<String, String>,
    #[serde(default)]
    overrides: HashMap<String, String>,
    #[serde(default)]
    endpoints: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TableAnswer {
    metadata_location: Option<String>,
    metadata: TableMetadata,
    #[serde(default)]
    config: Option<HashMap<String, String>>,
    #[serde(default)]
    storage_credentials: Option<Vec<StorageCredential>>,
}

#[derive(Deserialize)]
struct StorageCredential {
    prefix: String,
    config: HashMap<String, String>,
}

impl RestCatalog {
    pub async fn open(config: &RestConfig, storage: TableStorage) -> Result<RestCatalog, Error> {
        let mut client = Client::new(config)?;
        let query: Vec<(&str, &str)> = config.warehouse.iter().map(|w| ("warehouse", w.as_str())).collect();
        let answer = client.get_config(&query).await.map_err(Failure::of_read)?;
        let answer: ConfigAnswer = serde_json::from_slice(&answer).map_err(|e| {
            let uri = client.base();
            Error::fatal(format!(
                "catalog {uri}: GET v1/config: not the answer of an Iceberg REST catalog: {e}; check catalog.uri"
            ))
        })?;
        let ConfigAnswer { defaults: mut settings, overrides, endpoints } = answer;
        settings.extend(overrides);
        let base =
            match settings.get("uri") {
                Some(uri) => Some(Url::parse(uri).map_err(|e| {
                    Error::fatal(format!("catalog {}: its own uri {uri:?} is none: {e}", client.base()))
                })?),
                None => None,
            };
        client.redirect(base, settings.get("prefix").map(String::as_str));
        settings.retain(|key, _| key.starts_with("s3.") || key == "client.region");
        let transactions = endpoints.iter().any(|endpoint| endpoint == COMMIT_TRANSACTION);
        let inner = |this: &Weak<Inner>| Inner { client, storage, transactions, settings, this: this.clone() };
        Ok(RestCatalog(Arc::new_cyclic(inner)))
    }
}

impl Inner {
    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        let path = table_path(table);
        match self.client.get(&path).await {
            Ok(answer) => self.table(table, &answer).map(Some),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(failure.of_read()),
        }
    }

    fn table(&self, table: &TableName, answer: &[u8]) -> Result<LoadedTable, Error> {
        let not_one = |e: &dyn std::fmt::Display| {
            Error::fatal(format!("catalog {}: its answer is no table {table}: {e}", self.client.base()))
        };
        let TableAnswer { metadata_location, metadata, config, storage_credentials } =
            serde_json::from_slice(answer).map_err(|e| not_one(&e))?;
        let metadata_location = metadata_location.ok_or_else(|| not_one(&"it has no metadata-location"))?;
        let reload =
            || -> Arc<dyn Reload> { Arc::new(ReloadTable { catalog: self.this.clone(), table: table.clone() }) };
        let mut settings = self.settings.clone();
        settings.extend(config.unwrap_or_default());
        let mut locations = vec![metadata.location().to_string()];
        locations.extend(metadata.properties().get("write.data.path").cloned());
        for location in locations {
            self.storage.vended().accept(&location, &settings, reload);
        }
        for StorageCredential { prefix, config } in storage_credentials.unwrap_or_default() {
            let mut settings = settings.clone();
            settings.extend(config);
            self.storage.vended().accept(&prefix, &settings, reload);
        }
        Ok(LoadedTable { metadata_location, metadata: Arc::new(metadata) })
    }

    async fn create_namespace(&self, table: &TableName) -> Result<(), Error> {
        let levels: Vec<&str> = table.namespace.split('.').collect();
        match self.client.post("namespaces", &json!({"namespace": levels, "properties": {}})).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_conflict() => Ok(()),
            Err(failure) => Err(failure.of_write()),
        }
    }
}

/// What vended credentials are replaced with.
#[derive(Debug)]
struct ReloadTable {
    catalog: Weak<Inner>,
    table: TableName,
}

#[async_trait]
impl Reload for ReloadTable {
    async fn reload(&self) -> Result<(), Error> {
        // Without the catalog, what it gave last has to do.
        let Some(catalog) = self.catalog.upgrade() else { return Ok(()) };
        catalog.load(&self.table).await.map(|_| ())
    }
}

#[async_trait]
impl Catalog for RestCatalog {
    fn commits_together(&self) -> bool {
        self.0.transactions
    }

    fn guards_properties(&self) -> bool {
        false
    }

    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        self.0.load(table).await
    }

    async fn create(&self, table: &TableName, creation: TableCreation) -> Result<LoadedTable, Error> {
        let body = creation_body(table, creation)?;
        let path = format!("{}/tables", namespace_path(table));
        let mut answer = self.0.client.post(&path, &body).await;
        if answer.as_ref().is_err_and(Failure::is_not_found) {
            self.0.create_namespace(table).await?;
            answer = self.0.client.post(&path, &body).await;
        }
        match answer {
            Ok(answer) => self.0.table(table, &answer),
            Err(failure) if failure.is_conflict() => {
                let message = failure.to_string();
                self.load(table).await?.ok_or_else(|| {
                    Error::fatal(format!(
                        "cannot create table {table}: the catalog has something else, such as a view, of that name: {message}"
                    ))
                })
            }
            Err(failure) => Err(failure.of_write()),
        }
    }

    async fn commit(&self, changes: &[TableChange]) -> Result<(), CommitError> {
        if failpoint::hit("commit.metadata_written") {
            return Err(CommitError::Failed(Error::transient("failpoint commit.metadata_written")));
        }
        let answer = match changes {
            [] => return Ok(()),
            [change] => self.0.client.post(&table_path(&change.table), &change_body(change)).await,
            changes if self.0.transactions => {
                let changes: Vec<Value> = changes.iter().map(change_body).collect();
                self.0.client.post("transactions/commit", &json!({"table-changes": changes})).await
            }
            _ => return Err(Error::fatal("this catalog cannot commit several tables together").into()),
        };
        match answer {
            Ok(_) => {}
            Err(failure) if failure.is_conflict() => return Err(CommitError::Conflict(failure.to_string())),
            Err(failure) => return Err(failure.of_write().into()),
        }
        if failpoint::hit("commit.committed") {
            return Err(CommitError::Failed(Error::indeterminate("failpoint commit.committed")));
        }
        Ok(())
    }
}

fn change_body(change: &TableChange) -> Value {
    let namespace: Vec<&str> = change.table.namespace.split('.').collect();
    json!({
        "identifier": {"namespace": namespace, "name": change.table.name},
        "requirements": change.requirements(),
        "updates": change.updates,
    })
}

fn creation_body(table: &TableName, creation: TableCreation) -> Result<Value, Error> {
    let mut properties = creation.properties;
    properties.insert("format-version".into(), (creation.format_version as u8).to_string());
    let no_json = |e| Error::fatal(format!("cannot create table {table}: it has no JSON form: {e}"));
    let mut body = json!({
        "name": table.name,
        "stage-create": false,
        "schema": serde_json::to_value(&creation.schema).map_err(no_json)?,
        "properties": properties,
    });
    if let Some(spec) = &creation.partition_spec {
        body["partition-spec"] = serde_json::to_value(spec).map_err(no_json)?;
        // The server gives its own ids, and Java's parser and Nessie want some all the same.
        body["partition-spec"]["spec-id"] = json!(spec.spec_id().unwrap_or_default());
        let fields = body["partition-spec"]["fields"].as_array_mut().into_iter().flatten();
        for (id, field) in (FIRST_PARTITION_FIELD..).zip(fields) {
            field["field-id"] = json!(id);
        }
    }
    if let Some(order) = &creation.sort_order {
        body["write-order"] = serde_json::to_value(order).map_err(no_json)?;
    }
    Ok(body)
}
