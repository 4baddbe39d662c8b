//! What can be seen of the NBD side while backups run: `/metrics` and the list of exports.

use std::collections::BTreeMap;
use std::path::Path;

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::{Value, json};

use crate::rig::{self, Plan, Rig, id_of};

/// Labels that metrics may have, and `le` for buckets.
const LABELS: [&str; 7] = ["repository", "node", "state", "code", "op", "kind", "le"];

/// One metric of a page.
#[derive(Clone, Debug, PartialEq)]
struct Family {
    kind: String,
    help: String,
    /// By name of the sample and its labels, as written.
    samples: BTreeMap<String, f64>,
}

type Page = BTreeMap<String, Family>;

/// Reads the text format 0.0.4, and holds it to the rules: each metric has HELP, then TYPE, then its samples, all together
/// and each once; names and labels are well formed; histograms add up.
fn parse(text: &str) -> Page {
    let mut page = Page::new();
    let mut current = String::new();
    let mut lines = text.lines();
    assert!(text.ends_with('\n'));
    while let Some(line) = lines.next() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            let kind = lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} ")));
            let kind = kind.unwrap_or_else(|| panic!("no TYPE behind {line}"));
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{name} is a {kind}");
            assert!(is_name(name) && name.starts_with("blockyard_") && !help.is_empty(), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            let family = Family { kind: kind.to_owned(), help: help.to_owned(), samples: BTreeMap::new() };
            assert!(page.insert(name.to_owned(), family).is_none(), "{name} is there twice");
            name.clone_into(&mut current);
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        let (name, labels) = labels_of(series);
        let family = page.get_mut(&current).unwrap_or_else(|| panic!("no HELP before {line}"));
        let suffix = name.strip_prefix(current.as_str()).unwrap_or_else(|| panic!("{line} is not of {current}"));
        let suffixes: &[&str] = if family.kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(suffixes.contains(&suffix), "{line}");
        assert_eq!(suffix == "_bucket", labels.contains_key("le"), "{line}");
        assert!(value >= 0.0, "{line}");
        assert!(family.samples.insert(series.to_owned(), value).is_none(), "{series} is there twice");
    }
    for (name, family) in &page {
        assert!(!family.samples.is_empty(), "{name} has no samples");
        if family.kind == "histogram" {
            histograms_add_up(name, family);
        }
    }
    page
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

/// The name of a series and its labels.
fn labels_of(series: &str) -> (&str, BTreeMap<&str, &str>) {
    let Some((name, rest)) = series.split_once('{') else { return (series, BTreeMap::new()) };
    let rest = rest.strip_suffix('}').unwrap_or_else(|| panic!("{series}"));
    let mut labels = BTreeMap::new();
    for pair in rest.split(',') {
        let (label, value) = pair.split_once('=').unwrap_or_else(|| panic!("{series}"));
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let value = value.filter(|value| !value.contains(['"', '\\'])).unwrap_or_else(|| panic!("{series}"));
        assert!(LABELS.contains(&label), "{series}: {label}");
        assert!(labels.insert(label, value).is_none(), "{series}");
    }
    (name, labels)
}

fn histograms_add_up(name: &str, family: &Family) {
    // By the labels but `le`: bounds with their counts, and the count of all.
    let mut buckets: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (series, value) in &family.samples {
        let (_, mut labels) = labels_of(series);
        if let Some(bound) = labels.remove("le") {
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
            buckets.entry(format!("{labels:?}")).or_default().push((bound, *value));
        }
    }
    let mut counts = 0;
    for (series, count) in family.samples.iter().filter(|(series, _)| series.starts_with(&format!("{name}_count"))) {
        let mut of_it = buckets.remove(&format!("{:?}", labels_of(series).1)).unwrap_or_default();
        of_it.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(of_it.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{series}: {of_it:?}");
        assert_eq!(of_it.last(), Some(&(f64::INFINITY, *count)), "{series}");
        counts += 1;
    }
    assert!(buckets.is_empty() && counts > 0, "{name}: {buckets:?}");
}

async fn scrape(rig: &Rig) -> Page {
    let answer = rig.service.get("/metrics").await.expect_status(200);
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    parse(&answer.text)
}

/// The value of one series.
#[track_caller]
fn of(page: &Page, series: &str) -> u64 {
    let name = series.split('{').next().unwrap();
    let family = page.iter().rev().find(|(family, _)| name.starts_with(family.as_str()));
    let value = family.and_then(|(_, family)| family.samples.get(series));
    *value.unwrap_or_else(|| panic!("no {series} in {page:#?}")) as u64
}

/// Holds that both pages have the same series, and that nothing counted in the first is less in the second.
fn only_grew(before: &Page, after: &Page) {
    for (name, family) in before {
        let later = &after[name];
        assert!(family.samples.keys().eq(later.samples.keys()), "{name} has other series than before");
        if family.kind != "gauge" {
            for (series, value) in &family.samples {
                assert!(*value <= later.samples[series], "{series} went from {value} to {}", later.samples[series]);
            }
        }
    }
    assert!(before.keys().eq(after.keys()));
}

/// The bytes that a backup's record says were received.
fn received(backup: &Value) -> u64 {
    let disks = backup["disks"].as_array().unwrap();
    disks.iter().map(|disk| disk["written_bytes"].as_u64().unwrap() + disk["zeroed_bytes"].as_u64().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_well_formed_count_what_passed_and_never_go_back() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let before = scrape(&rig).await;
    for (name, family) in &before {
        let limit = name.contains("limit") || name == "blockyard_ports";
        assert!(limit || family.samples.values().all(|value| *value == 0.0), "{name}: {:?}", family.samples);
    }
    // Those of the rig, and those for exports of restore points.
    assert_eq!(of(&before, "blockyard_ports"), 16 + 100);
    assert_eq!(of(&before, "blockyard_nbd_payload_limit_bytes{kind=\"write\"}"), 128 << 20);

    // Two disks are copied, the first one is complete, and the client waits.
    let started = rig.start().await;
    rig.paused().await;
    let during = scrape(&rig).await;
    only_grew(&before, &during);
    assert_eq!(of(&during, "blockyard_jobs{state=\"transferring\"}"), 1);
    assert_eq!(of(&during, "blockyard_ports_leased"), 3);
    assert_eq!(of(&during, "blockyard_nbd_exports"), 3);
    assert!(of(&during, "blockyard_nbd_connections") > 0);
    assert!(of(&during, "blockyard_nbd_sockets") > 0);
    assert!(of(&during, "blockyard_nbd_request_duration_seconds_count{op=\"write\"}") > 0);

    rig.node.resume();
    let first = rig.end_of(id_of(&started)).await;
    assert_eq!(first["state"], "committed", "{first:#}");
    rig.expect_nothing_left(1).await;
    let after = scrape(&rig).await;
    only_grew(&during, &after);
    let bytes = |page: &Page| {
        of(page, "blockyard_nbd_bytes_total{kind=\"written\"}") + of(page, "blockyard_nbd_bytes_total{kind=\"zeroed\"}")
    };
    assert_eq!(bytes(&after), received(&first));
    for gone in ["exports", "connections", "requests_in_flight", "payload_bytes{kind=\"write\"}"] {
        assert_eq!(of(&after, &format!("blockyard_nbd_{gone}")), 0, "{gone}");
    }
    assert_eq!(of(&after, "blockyard_nbd_connections_opened_total"), 6);
    assert_eq!(of(&after, "blockyard_nbd_connections_accepted_total"), 6);
    assert_eq!(of(&after, "blockyard_ports_leased"), 0);
    assert_eq!(of(&after, "blockyard_jobs_ended_total{state=\"committed\"}"), 1);

    // The listeners of a second job begin at zero, the sums do not.
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let second = rig.back_up().await;
    let last = scrape(&rig).await;
    only_grew(&after, &last);
    assert_eq!(bytes(&last), received(&first) + received(&second));
    assert_eq!(of(&last, "blockyard_jobs_ended_total{state=\"committed\"}"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_connections_errors_and_failed_jobs_are_counted() {
    let toml = "[nbd]\nmax_connections_per_export = 2\n".to_owned();
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk2", started["disk_results"][2]["nbd_port"]);
    let mut links = [rig::Nbd::connect(&uri), rig::Nbd::connect(&uri)];
    assert!(rig::Nbd::try_connect(&uri).is_err());
    // The disk has 512 bytes.
    assert_eq!(links[0].write(0, &[1; 1024]).unwrap_err().raw_os_error(), Some(28));
    let page = scrape(&rig).await;
    assert_eq!(of(&page, "blockyard_nbd_connections_refused_total{kind=\"export\"}"), 1);
    assert_eq!(of(&page, "blockyard_nbd_errors_total{code=\"ENOSPC\"}"), 1);
    assert_eq!(of(&page, "blockyard_nbd_errors_total{code=\"EIO\"}"), 0);
    drop(links);
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    let page = scrape(&rig).await;
    assert_eq!(of(&page, "blockyard_jobs_ended_total{state=\"cancelled\"}"), 1);
    assert_eq!(of(&page, "blockyard_nbd_connections_refused_total{kind=\"export\"}"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_show_their_disk_their_connections_and_what_was_done() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let none = rig.service.get("/api/v1/nbd/exports").await.expect_status(200).json();
    assert_eq!(none, json!({"total": 0, "exports": []}));
    let started = rig.start().await;
    rig.paused().await;
    let list = rig.service.get("/api/v1/nbd/exports").await.expect_status(200).json();
    assert_eq!(list["total"], 3);
    for (export, disk) in list["exports"].as_array().unwrap().iter().zip(started["disk_results"].as_array().unwrap()) {
        assert_eq!((&export["name"], &export["port"]), (&disk["nbd_export_name"], &disk["nbd_port"]), "{export:#}");
        assert_eq!(export["address"], format!("127.0.0.1:{}", disk["nbd_port"]));
        assert_eq!((&export["job_id"], &export["disk_id"]), (&started["backup_id"], &disk["disk_id"]));
        assert_eq!((&export["size_bytes"], &export["read_only"]), (&disk["size_bytes"], &json!(false)));
        assert_eq!((&export["connections"], &export["counts"]["requests"]), (&json!([]), &json!(0)));
    }

    let uri = format!("nbd://127.0.0.1:{}/db-server-disk0", started["disk_results"][0]["nbd_port"]);
    let mut link = rig::Nbd::connect(&uri);
    link.write(0, &[7; 4096]).unwrap();
    link.write(1 << 40, &[7; 512]).unwrap_err();
    let seen = async {
        loop {
            let list = rig.service.get("/api/v1/nbd/exports").await.expect_status(200).json();
            // The end of a request is counted when its reply has left, which the client may see first.
            if list["exports"][0]["counts"]["in_flight"] == 0 {
                return list["exports"][0].clone();
            }
        }
    };
    let export = tokio::time::timeout(rig::DEADLINE, seen).await.expect("the last request never ended");
    let connection = &export["connections"][0];
    assert_eq!(connection["peer"], link.local_address(), "{export:#}");
    assert_eq!((&connection["id"], &connection["reply_mode"]), (&json!(1), &json!("simple")));
    assert_eq!(connection["tls_subject"], json!(null));
    assert!(connection["since"].as_str().unwrap().ends_with('Z'));
    assert_eq!(connection["counts"], export["counts"]);
    assert_eq!((&export["listener"]["accepted"], &export["listener"]["rejected"]), (&json!(1), &json!(0)));
    let counts = &export["counts"];
    assert_eq!((&counts["requests"], &counts["bytes_written"]), (&json!(2), &json!(4096)), "{counts:#}");
    assert_eq!(counts["errors"], json!({"ENOSPC": 1}));
    let latency = &counts["latency"][0];
    assert_eq!((&latency["op"], &latency["count"]), (&json!("write"), &json!(2)));
    let buckets = latency["buckets"].as_array().unwrap();
    assert_eq!(buckets.iter().map(|bucket| bucket["count"].as_u64().unwrap()).sum::<u64>(), 2);

    drop(link);
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    let none = rig.service.get("/api/v1/nbd/exports").await.expect_status(200).json();
    assert_eq!(none["total"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_documented_as_it_is_served() {
    let rig = Rig::new().await;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let documented: Vec<&str> = text.lines().filter(|line| line.starts_with("| `blockyard_")).collect();
    let page = rig.service.get("/metrics").await.expect_status(200).text;
    let families = parse(&page);
    // In the order of the page.
    let names = page.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next());
    let served: Vec<String> = names
        .map(|name| {
            let Family { kind, help, samples } = &families[name];
            let labels = labels_of(samples.keys().next().unwrap()).1;
            let labels: Vec<String> =
                labels.keys().filter(|label| **label != "le").map(|label| format!("`{label}`")).collect();
            format!("| `{name}` | {kind} | {} | {help} |", labels.join(", "))
        })
        .collect();
    assert_eq!(documented, served, "the table should be:\n{}", served.join("\n"));
}
