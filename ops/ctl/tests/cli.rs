//! The program as scripts see it: exit codes, JSON, and no token anywhere.

use std::net::TcpListener;
use std::process::{Command, Output};

use serde_json::Value;

fn ctl(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeepctl"));
    for name in ["KVKEEP_ENDPOINT", "KVKEEP_TOKEN", "KVKEEP_CA"] {
        command.env_remove(name);
    }
    command.args(args).output().expect("the program starts")
}

/// An address where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").to_string()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("one JSON object")
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for args in [&["frobnicate"][..], &["explain"], &["explain", "xyz"], &["block", "list", "--limit", "0"], &[]] {
        assert_eq!(ctl(args).status.code(), Some(2), "{args:?}");
    }
    for args in ["list --attribute user", "show", "hint a", "hint a --finished --paused", "fork a", "truncate a x"] {
        let args: Vec<_> = std::iter::once("session").chain(args.split(' ')).collect();
        assert_eq!(ctl(&args).status.code(), Some(2), "{args:?}");
    }
    assert_eq!(ctl(&["--endpoint", "ftp://x", "status"]).status.code(), Some(2));
}

#[test]
fn nobody_there_exits_with_3_and_says_what_to_do() {
    let endpoint = nobody();
    for args in [
        &["status"][..],
        &["namespace", "list"],
        &["explain", "text:key"],
        &["events"],
        &["scrub"],
        &["session", "list"],
    ] {
        let output = ctl(&[&["--endpoint", &endpoint], args].concat());
        assert_eq!(output.status.code(), Some(3), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("kvkeepd"), "{text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_failure_is_json_where_json_was_asked_for() {
    let output = ctl(&["--endpoint", &nobody(), "--json", "--token", "hunter2", "status"]);
    let error = json(&output.stderr);
    assert_eq!(error["schema"], "kvkeepctl/error");
    assert_eq!(error["version"], 1);
    assert_eq!(error["kind"], "unreachable");
    assert_eq!(error["exit_code"], 3);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("hunter2"));
}

#[test]
fn the_doctor_names_every_check_and_what_to_do() {
    let output = ctl(&["doctor", "--offline", "--json"]);
    let report = json(&output.stdout);
    assert_eq!(report["schema"], "kvkeepctl/doctor");
    let checks = report["checks"].as_array().expect("a list of checks");
    for name in
        ["memory", "io_uring", "locked memory", "arena folder", "huge pages", "disk", "direct I/O", "open files"]
    {
        let check = checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{name} is looked at"));
        assert_eq!(check["level"] == "ok", check["advice"].is_null(), "{check}");
    }
    assert_eq!(output.status.code(), Some(i32::from(report["worst"] == "bad")));
}

#[test]
fn a_doctor_without_a_server_says_so() {
    let output = ctl(&["--endpoint", &nobody(), "doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let checks = json(&output.stdout)["checks"].clone();
    let endpoint = checks.as_array().and_then(|all| all.iter().find(|c| c["name"] == "endpoint")).cloned();
    assert_eq!(endpoint.expect("the endpoint is looked at")["level"], "bad");
}

#[test]
fn a_demo_without_a_server_program_says_which_it_wants() {
    let output = ctl(&["demo", "--kvkeepd", "/nonexistent/kvkeepd"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/kvkeepd"));
}

#[test]
fn help_tells_the_exit_codes_and_hides_the_token() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeepctl"));
    let output = command.env("KVKEEP_TOKEN", "hunter2").arg("--help").output().expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("3  unreachable") && !text.contains("hunter2"), "{text}");
}
