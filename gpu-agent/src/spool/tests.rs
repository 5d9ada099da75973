use super::*;

fn say(spool: &Spool, assignment: &Assignment, last: bool) -> u64 {
    spool.append(assignment, last, |n| format!("message {n}").into_bytes()).unwrap()
}

/// Numbers of all that would be sent now, in order.
fn unsent(spool: &Spool, window: u64) -> Vec<u64> {
    let mut sent = BTreeMap::new();
    let mut numbers = Vec::new();
    while let Some(message) = spool.next(&sent, window).unwrap() {
        assert_eq!(message.payload, format!("message {}", message.sequence).into_bytes());
        sent.insert(message.assignment, message.sequence);
        numbers.push(message.sequence);
    }
    numbers
}

#[test]
fn what_is_not_acknowledged_survives() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("s/1", 3);
    let spool = Spool::open(dir.path()).unwrap();
    for _ in 0..4 {
        say(&spool, &trial, false);
    }
    assert!(!spool.acknowledge(&trial, 2).unwrap());
    drop(spool);

    let spool = Spool::open(dir.path()).unwrap();
    assert_eq!(spool.assignments(), vec![trial.clone()]);
    assert_eq!(unsent(&spool, 99), vec![3, 4]);
    assert_eq!(unsent(&spool, 1), vec![3], "no further than the window");
    assert_eq!(say(&spool, &trial, true), 5);
    assert!(spool.unfinished().is_empty());
    assert!(spool.append(&trial, false, |_| Vec::new()).is_err(), "nothing comes behind the last");
    assert!(!spool.acknowledge(&trial, 4).unwrap());
    assert!(spool.acknowledge(&trial, 5).unwrap());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_torn_end_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("s/1", 1);
    let path = dir.path().join(trial.file_name());
    let spool = Spool::open(dir.path()).unwrap();
    for _ in 0..3 {
        say(&spool, &trial, false);
    }
    drop(spool);
    let whole = std::fs::read(&path).unwrap();
    let name = HEAD + trial.trial.as_str().len();
    let each = HEAD + "message 1".len();
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        let kept = cut.saturating_sub(name) / each;
        assert_eq!(unsent(&spool, 99), (1..=kept as u64).collect::<Vec<_>>(), "cut at {cut}");
        assert_eq!(path.exists(), cut >= name);
        if cut >= name {
            assert_eq!(say(&spool, &trial, false), kept as u64 + 1, "and it goes on");
        }
    }
    let mut damaged = whole.clone();
    damaged[name + each + HEAD] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert_eq!(unsent(&Spool::open(dir.path()).unwrap(), 99), vec![1]);
}

#[test]
fn a_file_of_acknowledged_messages_stays_small() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("s/1", 1);
    let spool = Spool::open(dir.path()).unwrap();
    for _ in 0..100 {
        let sequence = spool.append(&trial, false, |_| vec![7; 10_000]).unwrap();
        spool.acknowledge(&trial, sequence).unwrap();
    }
    assert!(std::fs::metadata(dir.path().join(trial.file_name())).unwrap().len() < 2 * COMPACT_BYTES);
    drop(spool);
    let spool = Spool::open(dir.path()).unwrap();
    assert_eq!(say(&spool, &trial, false), 101, "the numbers go on");
}

#[tokio::test]
async fn waiting_for_an_acknowledgement() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("s/1", 1);
    let spool = Spool::open(dir.path()).unwrap();
    spool.drained().await;
    for forgotten in [false, true] {
        let sequence = say(&spool, &trial, false);
        let wait = spool.acknowledged(&trial, sequence);
        let end = async {
            match forgotten {
                true => assert!(!spool.forget(&trial)),
                false => assert!(!spool.acknowledge(&trial, sequence).unwrap()),
            }
        };
        let (still_there, ()) = tokio::join!(wait, end);
        assert_eq!(still_there, !forgotten);
    }
    let sequence = say(&spool, &trial, true);
    assert!(spool.acknowledge(&trial, sequence).unwrap());
    spool.drained().await;
}

#[test]
fn a_look_changes_nothing_and_tells_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("s/1", 1);
    let path = dir.path().join(trial.file_name());
    assert_eq!(inspect(&dir.path().join("none")).unwrap(), []);
    let spool = Spool::open(dir.path()).unwrap();
    for _ in 0..3 {
        spool.append(&trial, false, |_| Vec::new()).unwrap();
    }
    spool.acknowledge(&trial, 1).unwrap();
    drop(spool);
    let whole = std::fs::read(&path).unwrap();
    let look = || {
        let before = std::fs::read(&path).unwrap();
        let found = inspect(dir.path()).unwrap().remove(0);
        assert_eq!(std::fs::read(&path).unwrap(), before);
        (found.unacknowledged, found.torn, found.problems.join("; "))
    };
    assert_eq!(look(), (2, 0, String::new()));
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(look(), (3, HEAD - 1, String::new()), "the acknowledgement is torn");
    let other = dir.path().join(Assignment::new("s/2", 1).file_name());
    std::fs::rename(&path, &other).unwrap();
    let problems = inspect(dir.path()).unwrap().remove(0).problems;
    assert_eq!(problems, ["its first record names s/1 (attempt 1)"]);
}
