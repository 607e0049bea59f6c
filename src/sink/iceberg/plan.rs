//! What becomes of the tables at a start: one plan, shown by `floe check` and carried out by `floe run`.
//!
//! Invariants: nothing is created before every table is known to fit; a table that is there is not changed, only the schema
//! is settled that the first commit gives it; carrying a plan out again changes nothing.

use std::fmt;
use std::sync::Arc;

use iceberg::spec::TableMetadata;

use super::catalog::{Catalog, LoadedTable, TableName};
use super::evolution::{self, Change, Evolution};
use super::{TableSpec, layout};
use crate::sink::Error;

/// Someone else may create tables at the same time, in another form: so often they are looked at again.
const ATTEMPTS: u32 = 5;

/// What a start does to one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePlan {
    /// `namespace.table`.
    pub table: String,
    pub step: TableStep,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableStep {
    Create,
    Keep,
    Evolve(Vec<Change>),
    /// Why it cannot be used, and what to do about it.
    Refuse(String),
}

impl fmt::Display for TablePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.step {
            TableStep::Create => write!(f, "{}: will be created", self.table),
            TableStep::Keep => write!(f, "{}: fits", self.table),
            TableStep::Evolve(changes) => write!(f, "{}: will {}", self.table, evolution::listed(changes)),
            TableStep::Refuse(reason) => f.write_str(reason),
        }
    }
}

/// A plan, and what it takes to carry it out.
pub struct Planned {
    pub plan: TablePlan,
    name: TableName,
    loaded: Option<LoadedTable>,
    evolved: Option<TableMetadata>,
}

/// A table that fits, or will with its first commit.
pub struct Opened {
    pub name: TableName,
    pub metadata: Arc<TableMetadata>,
    /// As it is to be, where that is not what it is.
    pub evolved: Option<TableMetadata>,
}

/// Without a catalog there are no tables yet.
pub async fn plan(catalog: Option<&dyn Catalog>, specs: &[TableSpec]) -> Result<Vec<Planned>, Error> {
    let mut planned: Vec<Planned> = Vec::with_capacity(specs.len());
    for spec in specs {
        let name = TableName::parse(&spec.name)?;
        if planned.iter().any(|p| p.name == name) {
            return Err(Error::fatal(format!("table {name} is named twice: every output needs a table of its own")));
        }
        let loaded = match catalog {
            Some(catalog) => catalog.load(&name).await?,
            None => None,
        };
        let mut evolved = None;
        let step = match &loaded {
            None => match layout::creation(spec) {
                Ok(_) => TableStep::Create,
                Err(e) => TableStep::Refuse(e.to_string()),
            },
            Some(loaded) => match layout::evolution(spec, &loaded.metadata)? {
                Evolution::Same => TableStep::Keep,
                Evolution::Refuse(why) => TableStep::Refuse(refusal(&name, &why)),
                Evolution::Evolve { changes, schema } => match evolution::apply(&name, loaded, *schema) {
                    Ok(change) => {
                        evolved = Some(change.metadata);
                        TableStep::Evolve(changes)
                    }
                    // Such as a new column with the name of a partition field.
                    Err(e) => TableStep::Refuse(refusal(&name, &format!("  {}: {e}", evolution::listed(&changes)))),
                },
            },
        };
        planned.push(Planned { plan: TablePlan { table: name.to_string(), step }, name, loaded, evolved });
    }
    Ok(planned)
}

fn refusal(table: &TableName, why: &str) -> String {
    format!(
        "table {table} does not fit the pipeline. Mend what is marked ! in the schema or in the table, or write to a new table:\n{why}"
    )
}

/// Every table, in the order of the specs; those that are missing are created.
pub async fn carry_out(catalog: &dyn Catalog, pipeline: &str, specs: &[TableSpec]) -> Result<Vec<Opened>, Error> {
    for _ in 0..ATTEMPTS {
        let planned = plan(Some(catalog), specs).await?;
        let refused: Vec<&str> = planned
            .iter()
            .filter_map(|p| if let TableStep::Refuse(why) = &p.plan.step { Some(why.as_str()) } else { None })
            .collect();
        if !refused.is_empty() {
            return Err(Error::fatal(format!("{}\nnothing was read, and no table was changed", refused.join("\n"))));
        }
        let missing: Vec<_> = planned.iter().zip(specs).filter(|(p, _)| p.loaded.is_none()).collect();
        if missing.is_empty() {
            return Ok(planned.into_iter().filter_map(Planned::opened).collect());
        }
        for (Planned { name, .. }, spec) in missing {
            let created = catalog.create(name, layout::creation(spec)?).await?;
            tracing::info!(table = %name, pipeline, location = created.metadata.location(), "created table");
        }
    }
    Err(Error::transient("the tables are dropped as soon as they are created: another process may be at work on them"))
}

impl Planned {
    fn opened(self) -> Option<Opened> {
        let Planned { plan, name, loaded, evolved } = self;
        if let TableStep::Evolve(changes) = &plan.step {
            tracing::info!(
                table = plan.table,
                changes = evolution::listed(changes),
                "the next commit evolves the table"
            );
        }
        Some(Opened { name, metadata: loaded?.metadata, evolved })
    }
}
