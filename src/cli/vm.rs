//! `blockyard vm`: which VMs there are and which disks they have.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::Client;
use super::size::{Size, readable};
use super::{CliError, Exit, Output, table};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Add a VM, from a JSON file or from flags.
    Add(Add),
    /// List all VMs.
    List,
    /// Show a VM and its disks.
    Show(Named),
    /// Ask the VM's node which disks it has, and bring the inventory to that.
    Refresh(Named),
    /// Remove a VM from the inventory; its restore points stay.
    Remove(Named),
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// Name or id of the VM.
    #[arg(value_name = "VM")]
    vm: String,
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// The whole description, as `POST /api/v1/vms` takes it; - reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "vcenter_host", "path", "uuid", "credential", "node", "disks"])]
    file: Option<PathBuf>,
    #[arg(long, required_unless_present = "file")]
    name: Option<String>,
    #[arg(long, value_name = "HOST", required_unless_present = "file")]
    vcenter_host: Option<String>,
    /// Inventory path, such as /DC1/vm/prod/db-server.
    #[arg(long, required_unless_present = "file")]
    path: Option<String>,
    #[arg(long)]
    uuid: Option<String>,
    /// A [credentials.<name>] of the service's configuration.
    #[arg(long, value_name = "NAME")]
    credential: Option<String>,
    /// A [nodes.<name>] of the service's configuration.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// A disk, repeatable: its device key (or unit and number) and its size, such as 2000=40G or unit1=200G.
    #[arg(long = "disk", value_name = "KEY=SIZE")]
    disks: Vec<Disk>,
}

/// A disk as it is written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Disk {
    key: Key,
    size: Size,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Device(u32),
    Unit(u32),
}

/// The text is no disk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is no disk: write its device key and size, such as 2000=40G, or its unit and size, such as unit1=200G"
)]
struct DiskError {
    text: String,
}

impl FromStr for Disk {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        let parse = || {
            let (key, size) = text.split_once('=')?;
            let key = match key.strip_prefix("unit") {
                Some(unit) => Key::Unit(unit.parse().ok()?),
                None => Key::Device(key.parse().ok()?),
            };
            Some(Self { key, size: size.parse().ok()? })
        };
        parse().ok_or_else(|| DiskError { text: text.to_owned() })
    }
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    let client = Client::from_environment()?;
    match command {
        Command::Add(add) => {
            let vm = client.post("/vms", &description(add)?).await?;
            output.done(&vm, |vm| format!("added {} as {}", text(&vm["name"]), text(&vm["id"])))?;
        }
        Command::List => output.answer(&client.list("vms", &[]).await?, render_list)?,
        Command::Show(named) => output.answer(&find(&client, &named.vm).await?, render)?,
        Command::Refresh(named) => {
            let vm = find(&client, &named.vm).await?;
            let path = format!("/vms/{}/refresh", text(&vm["id"]));
            output.done(&client.post_at_length(&path, &[], &json!({})).await?, render_refreshed)?;
        }
        Command::Remove(named) => {
            let vm = find(&client, &named.vm).await?;
            client.delete(&format!("/vms/{}", text(&vm["id"]))).await?;
            output.done(&vm, |vm| format!("removed {} ({})", text(&vm["name"]), text(&vm["id"])))?;
        }
    }
    Ok(Exit::Ok)
}

/// The VM by its id, or by its name when only one has it.
async fn find(client: &Client, vm: &str) -> Result<Value, CliError> {
    if vm.parse::<crate::id::VmId>().is_ok() {
        return Ok(client.get(&format!("/vms/{vm}"), &[]).await?);
    }
    let mut found = client.list("vms", &[("name", vm)]).await?;
    match found["vms"].as_array_mut().map(std::mem::take).unwrap_or_default().as_mut_slice() {
        [] => Err(CliError::NotFound { noun: "VM", name: vm.to_owned() }),
        [one] => Ok(one.take()),
        several => Err(CliError::Ambiguous {
            name: vm.to_owned(),
            ids: several.iter().map(|vm| text(&vm["id"]).to_owned()).collect(),
        }),
    }
}

fn description(add: Add) -> Result<Value, CliError> {
    if let Some(path) = add.file {
        return read_json(&path);
    }
    let texts = [
        ("name", add.name),
        ("vcenter_host", add.vcenter_host),
        ("path", add.path),
        ("uuid", add.uuid),
        ("credential", add.credential),
        ("node", add.node),
    ];
    let mut vm: Map<String, Value> =
        texts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.into()))).collect();
    let disks = add.disks.into_iter().map(|Disk { key, size: Size(size_bytes) }| match key {
        Key::Device(key) => json!({"device_key": key, "size_bytes": size_bytes}),
        Key::Unit(unit) => json!({"unit_number": unit, "size_bytes": size_bytes}),
    });
    vm.insert("disks".to_owned(), disks.collect());
    Ok(vm.into())
}

fn read_json(path: &Path) -> Result<Value, CliError> {
    let unreadable = |source| CliError::Unreadable { path: path.to_owned(), source };
    let mut content = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut content).map_err(unreadable)?;
    } else {
        content = std::fs::read_to_string(path).map_err(unreadable)?;
    }
    serde_json::from_str(&content).map_err(|source| CliError::NotJson { path: path.to_owned(), source })
}

/// Text of a document, `-` where there is none.
pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), readable)
}

fn render_list(document: &Value) -> String {
    let rows: Vec<Vec<String>> = rows(&document["vms"])
        .iter()
        .map(|vm| {
            let disks = rows(&vm["disks"]);
            let total: u64 = disks.iter().filter_map(|disk| disk["size_bytes"].as_u64()).sum();
            let texts = [&vm["id"], &vm["name"], &vm["vcenter_host"]].map(|value| text(value).to_owned());
            texts.into_iter().chain([disks.len().to_string(), readable(total), text(&vm["path"]).to_owned()]).collect()
        })
        .collect();
    table::render(&["id", "name", "vcenter", "disks", "size", "path"], &rows)
}

fn render(vm: &Value) -> String {
    let mut lines: Vec<String> = ["id", "name", "vcenter_host", "path", "uuid", "node", "credential", "created_at"]
        .iter()
        .map(|field| format!("{field:<13} {}", text(&vm[field])))
        .collect();
    let disks: Vec<Vec<String>> = rows(&vm["disks"])
        .iter()
        .map(|disk| {
            let numbers = [&disk["disk_id"], &disk["device_key"]].map(ToString::to_string);
            numbers.into_iter().chain([bytes(&disk["size_bytes"]), text(&disk["vmdk_path"]).to_owned()]).collect()
        })
        .collect();
    lines.push(String::new());
    lines.push(table::render(&["disk", "key", "size", "vmdk"], &disks));
    lines.join("\n")
}

fn render_refreshed(vm: &Value) -> String {
    let name = format!("{} ({})", text(&vm["name"]), text(&vm["id"]));
    let changes = rows(&vm["changes"]);
    if changes.is_empty() {
        return format!("refreshed {name}: nothing has changed");
    }
    let lines = changes.iter().map(|change| {
        let disk =
            format!("disk {} (key {}, {})", change["disk_id"], change["device_key"], bytes(&change["size_bytes"]));
        match text(&change["change"]) {
            "gone" => format!("{disk} is gone"),
            "resized" => format!("{disk} had {} before", bytes(&change["size_bytes_before"])),
            "described" => format!("{disk} has another path or unit"),
            other => format!("{disk} {other}"),
        }
    });
    [format!("refreshed {name}:")].into_iter().chain(lines).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_by_key_or_unit() {
        assert_eq!("2000=40G".parse(), Ok(Disk { key: Key::Device(2000), size: Size(40 << 30) }));
        assert_eq!("unit1=512".parse(), Ok(Disk { key: Key::Unit(1), size: Size(512) }));
        for wrong in ["", "2000", "2000=", "=40G", "unit=1G", "disk0=1G", "2000=-1"] {
            assert!(wrong.parse::<Disk>().is_err(), "{wrong}");
        }
    }
}
