//! Tables for people, JSON for programs.

use std::io::{self, Write as _};
use std::process::ExitCode;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Value, json};

use crate::failure::Failure;

/// Version of every JSON schema that this program prints. Fields may be added within one; a new one comes when a field
/// changes its meaning or goes away.
const SCHEMA_VERSION: u32 = 1;

/// Where answers go.
pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// An answer: `fields` under the schema `kvkeepctl/NAME`, or the text. The text is made only where it is shown.
    pub fn answer(&self, name: &str, fields: Value, text: impl FnOnce() -> String) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        if self.json {
            writeln!(stdout, "{}", with_schema(name, fields))?;
        } else {
            writeln!(stdout, "{}", text().trim_end())?;
        }
        stdout.flush()
    }

    /// A line for people only.
    pub fn say(&self, line: &str) -> io::Result<()> {
        if self.json { Ok(()) } else { writeln!(io::stdout(), "{line}") }
    }

    /// A failure, on standard error; with `--json` also as JSON there.
    pub fn failed(&self, failure: &Failure) -> ExitCode {
        let code = failure.code();
        if code != 0 {
            let mut stderr = io::stderr().lock();
            // Nobody is left to tell when standard error is closed.
            let _ = if self.json {
                let fields = json!({
                    "kind": failure.kind(), "message": failure.to_string(), "advice": failure.advice(), "exit_code": code,
                });
                writeln!(stderr, "{}", with_schema("error", fields))
            } else {
                let advice = failure.advice().map(|a| format!("\n{a}")).unwrap_or_default();
                writeln!(stderr, "kvkeepctl: {failure}{advice}")
            };
        }
        ExitCode::from(code)
    }
}

fn with_schema(name: &str, fields: Value) -> Value {
    let mut object = json!({ "schema": format!("kvkeepctl/{name}"), "version": SCHEMA_VERSION });
    if let (Value::Object(object), Value::Object(fields)) = (&mut object, fields) {
        object.extend(fields);
    }
    object
}

/// A table without lines: a head, and rows. Columns named in `right` (0-based) are numbers.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>, right: &[usize]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|h| h.to_uppercase()));
    table.add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    lines(&table)
}

/// Names and values, one a line.
pub fn pairs(rows: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.add_rows(rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    lines(&table)
}

/// The table's lines without the blanks that fill the last column.
fn lines(table: &Table) -> String {
    table.lines().map(|l| format!("{}\n", l.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_numbers_right_and_ends_no_line_with_blanks() {
        let text =
            table(&["tier", "used"], [vec!["dram".into(), "7".into()], vec!["nvme".into(), "1234".into()]], &[1]);
        assert_eq!(text, "TIER  USED\ndram     7\nnvme  1234\n");
        assert_eq!(pairs([("node", "n1".into()), ("state", String::new())]), "node   n1\nstate\n");
    }

    #[test]
    fn every_json_object_names_its_schema_and_version() {
        let v = with_schema("status", json!({"node": "n"}));
        assert_eq!(v, json!({"schema": "kvkeepctl/status", "version": 1, "node": "n"}));
    }
}
