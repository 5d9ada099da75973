//! The host against programs that are not what they should be. What it does with the real one is tested in
//! `cli/tests/engine.rs`, where that program is.

use super::*;
use domain::trial::TrialConfig;

/// A host of `/bin/sh` that runs a script for each child.
fn host(script: &str) -> (Host, Scope) {
    let scope = Scope::new();
    (start(launch(script), &scope), scope)
}

fn launch(script: &str) -> Launch {
    Launch {
        device: "cuda:0".into(),
        program: "/bin/sh".into(),
        arguments: ["-c", script].map(OsString::from).into(),
        variables: Vec::new(),
        first_pause: Duration::from_millis(1),
    }
}

fn admit(trial: &str) -> Command {
    Command::Admit(Box::new(Admission {
        assignment: Assignment::new(trial, 1),
        config: TrialConfig::default(),
        resume: None,
        digests: None,
        evaluations: None,
        places: Default::default(),
        cache: None,
        work_dir: "nowhere".into(),
        belongs: None,
    }))
}

/// The next that is said of a trial.
async fn next(host: &mut Host) -> (String, Happening) {
    loop {
        match host.events.recv().await.expect("the host lives") {
            Event::Trial(assignment, happening) => return (assignment.trial.to_string(), happening),
            Event::BaseResident(base) => assert_eq!(base, None),
            Event::Phase(..) | Event::Steps(_) | Event::Quantised { .. } => {}
        }
    }
}

/// Why the next trial failed, which is no fault of its own.
async fn failed(host: &mut Host) -> String {
    match next(host).await {
        (_, Happening::Failed(Failure { class: FailureClass::Infrastructure, message })) => message,
        other => panic!("a failure of the infrastructure expected, but {other:?}"),
    }
}

/// What a trial's end looks like on the pipe.
fn line(trial: &str, happening: Happening) -> String {
    let event = Event::Trial(Assignment::new(trial, 1), happening);
    String::from_utf8(lines::encode(&event).unwrap()).unwrap().trim().to_string()
}

fn finished() -> Happening {
    let ending = super::super::Ending::Completed;
    Happening::Finished { ending, summary: Box::default(), message: String::new() }
}

#[tokio::test]
async fn each_way_to_die_fails_the_trials_it_held() {
    for (script, said) in [
        ("read line; exit 3", "exit status: 3"),
        ("read line; kill -SEGV $$", "signal: 11"),
        ("read line; echo Segmentation fault; exec sleep 1000", "Segmentation fault"),
        ("exec 1>&-; read line; exit 4", "exit status: 4"),
        ("exec 0<&- ; exit 5", "exit status: 5"),
    ] {
        let (mut host, _scope) = host(script);
        host.commands.send(admit("a")).await.unwrap();
        let message = failed(&mut host).await;
        assert!(message.contains("cuda:0") && message.contains(said), "{script}: {message}");
    }
}

/// What is logged changes while a child runs, and the next one begins with it.
#[tokio::test]
async fn a_child_is_told_what_to_log() {
    let scope = Scope::new();
    let (levels, seen) = watch::channel(None);
    // The first waits for a second line, which the change alone brings.
    let first = "read admitted; read line; exit 7";
    let second = "read line; case \"$line\" in *Log*debug*) exit 8;; *) exit 9;; esac";
    for (script, change, said) in [(first, Some("debug"), "exit status: 7"), (second, None, "exit status: 8")]
    {
        let mut host = start_logging(launch(script), seen.clone(), &scope);
        host.commands.send(admit("a")).await.unwrap();
        if let Some(directives) = change {
            levels.send_replace(Some(directives.into()));
        }
        let message = tokio::time::timeout(Duration::from_secs(20), failed(&mut host)).await;
        let message = message.unwrap_or_else(|_| panic!("{script}: nothing was said to it"));
        assert!(message.contains(said), "{script}: {message}");
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_fails_the_trials_that_wait_for_it() {
    let scope = Scope::new();
    let launch = Launch {
        device: "cuda:1".into(),
        program: "/no/such/program".into(),
        arguments: Vec::new(),
        variables: Vec::new(),
        first_pause: Duration::from_millis(1),
    };
    let mut host = start(launch, &scope);
    host.commands.send(admit("a")).await.unwrap();
    let message = failed(&mut host).await;
    assert!(message.contains("cuda:1") && message.contains("/no/such/program"), "{message}");
}

#[tokio::test]
async fn after_so_many_deaths_in_a_row_nothing_is_admitted() {
    let (mut host, _scope) = host("read line; exit 1");
    for round in 1..=MAX_DEATHS + 1 {
        host.commands.send(admit("a")).await.unwrap();
        let message = failed(&mut host).await;
        assert_eq!(message.contains("not started again"), round > MAX_DEATHS, "{round}: {message}");
    }
}

#[tokio::test]
async fn a_trial_that_ends_sets_the_count_back() {
    let script = format!("read line; echo '{}'; read line; exit 1", line("good", finished()));
    let (mut host, _scope) = host(&script);
    for round in 0..=MAX_DEATHS {
        host.commands.send(admit("good")).await.unwrap();
        assert_eq!(next(&mut host).await, ("good".into(), finished()), "round {round}");
        host.commands.send(admit("bad")).await.unwrap();
        assert!(failed(&mut host).await.contains("exit status: 1"));
    }
}

#[tokio::test]
async fn what_it_had_said_is_heard_before_its_death() {
    let script = format!("read line; read line; echo '{}'; kill -KILL $$", line("a", Happening::Released));
    let (mut host, _scope) = host(&script);
    host.commands.send(admit("a")).await.unwrap();
    host.commands.send(admit("b")).await.unwrap();
    assert_eq!(next(&mut host).await, ("a".into(), Happening::Released));
    let (trial, happening) = next(&mut host).await;
    assert!(trial == "b" && matches!(happening, Happening::Failed(_)), "{trial}: {happening:?}");
}

/// Real time, since a child is real: a pause that no test could wait for.
#[tokio::test]
async fn a_trial_that_waits_for_the_next_child_can_be_ended() {
    let scope = Scope::new();
    let launch = Launch {
        device: "cuda:0".into(),
        program: "/bin/sh".into(),
        arguments: ["-c", "read line; exit 1"].map(OsString::from).into(),
        variables: Vec::new(),
        first_pause: Duration::from_secs(3600),
    };
    let mut host = start(launch, &scope);
    host.commands.send(admit("a")).await.unwrap();
    failed(&mut host).await;
    for (trial, how) in [("b", How::Drop), ("c", How::Release)] {
        host.commands.send(admit(trial)).await.unwrap();
        host.commands.send(Command::Stop(Assignment::new(trial, 1), how)).await.unwrap();
    }
    assert_eq!(next(&mut host).await, ("c".into(), Happening::Released));
}

#[tokio::test]
async fn it_ends_with_its_commands_and_its_child_with_it() {
    let said = line("a", Happening::Released);
    for rest in ["while read line; do :; done", "read line; exit 0", "exec 0<&-; exec 1>&-"] {
        let (mut host, scope) = host(&format!("read line; echo '{said}'; {rest}"));
        host.commands.send(admit("a")).await.unwrap();
        assert_eq!(next(&mut host).await, ("a".into(), Happening::Released));
        drop(host.commands);
        while host.events.recv().await.is_some() {}
        assert!(scope.finish(Duration::from_secs(60)).await, "{rest}");
    }
}

#[test]
fn pauses() {
    let first = Duration::from_secs(1);
    for (deaths, seconds) in [(0, 1), (1, 1), (2, 2), (4, 8), (6, 32), (7, 60), (99, 60)] {
        assert_eq!(pause(first, deaths), Duration::from_secs(seconds), "{deaths}");
    }
}
