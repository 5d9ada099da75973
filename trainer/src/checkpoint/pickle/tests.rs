//! Pickles by hand: what is refused, and that no bytes end the process.

use super::*;
use proptest::prelude::*;

/// `("storage", torch.FloatStorage, "0", "cpu", elements)`, as a persistent id.
fn storage(elements: u8) -> Vec<u8> {
    [b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK".as_slice(), &[elements], b"tQ"]
        .concat()
}

/// A dictionary of one tensor `w`: storage, offset, shape and strides are pickled by the caller.
fn tensor(storage: &[u8], rest: &[u8]) -> Vec<u8> {
    let head = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(".as_slice();
    [head, storage, rest, b"\x89}tRs."].concat()
}

fn check(name: &str, pickle: &[u8], want: Result<()>) {
    match (tensors(pickle).map(|_| ()), want) {
        (Ok(()), Ok(())) => {}
        (Err(got), Err(want)) => assert!(got.contains(&want), "{name}: {got}\nlacks {want}"),
        (got, want) => panic!("{name}: {got:?}, not {want:?}"),
    }
}

#[test]
fn what_a_pickle_may_say() {
    let refused = |why: &str| Err(why.to_string());
    let six = storage(6);
    let code = |text: &str| text.as_bytes().to_vec();
    let rows: Vec<(&str, Vec<u8>, Result<()>)> = vec![
        ("a tensor", tensor(&six, b"K\0K\x02K\x03\x86K\x03K\x01\x86"), Ok(())),
        ("an offset", tensor(&six, b"K\x04K\x02\x85K\x01\x85"), Ok(())),
        ("no tensors", b"\x80\x02}.".to_vec(), Ok(())),
        ("an ordered dictionary", code("\u{2}ccollections\nOrderedDict\n)R.")[1..].to_vec(), Ok(())),
        ("a system call", b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.".to_vec(), refused("uses posix.system, which")),
        ("another system call", b"\x80\x04\x8c\x02os\x8c\x06system\x93.".to_vec(), refused("uses os.system, which")),
        ("a name of torch", b"\x80\x02ctorch\nload\n.".to_vec(), refused("uses torch.load, which")),
        ("a storage of none", b"\x80\x02cos\nFloatStorage\n.".to_vec(), refused("uses os.FloatStorage")),
        ("an old instruction", b"\x80\x02(ios\nsystem\n.".to_vec(), refused("instruction 0x69, which")),
        ("a new object", b"\x80\x02ccollections\nOrderedDict\n)\x81.".to_vec(), refused("instruction 0x81")),
        ("a call of a type", b"\x80\x02ctorch\nFloatStorage\n)R.".to_vec(), refused("calls Storage((\"FloatStorage\"")),
        ("a call of a number", b"\x80\x02K\x01)R.".to_vec(), refused("calls what is no function (byte 5")),
        ("a dictionary of arguments", b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.".to_vec(), refused("1 arguments")),
        ("no dictionary", b"\x80\x02K\x01.".to_vec(), refused("holds no dictionary of tensors")),
        ("a number by name", b"\x80\x02}X\x01\0\0\0wK\x01s.".to_vec(), refused("holds \"w\", which is no tensor")),
        ("no name", b"\x80\x02}K\x01K\x01s.".to_vec(), refused("whose name is no text")),
        ("a later version", b"\x80\x09.".to_vec(), refused("is of pickle's version 9")),
        ("nothing", vec![], refused("cut off at byte 0")),
        ("no end", b"\x80\x02}".to_vec(), refused("cut off at byte 3")),
        ("a long text", b"\x80\x02X\xff\xff\xff\xff.".to_vec(), refused("cut off at byte 8")),
        ("an empty stack", b"\x80\x02.".to_vec(), refused("takes what is not there")),
        ("across a mark", b"\x80\x02K\x01(\x30.".to_vec(), refused("takes what is not there")),
        ("no mark", b"\x80\x02t.".to_vec(), refused("takes what is not there")),
        ("a forgotten value", b"\x80\x02h\x07.".to_vec(), refused("recalls 7")),
        ("a large number", b"\x80\x02\x8a\x09123456789.".to_vec(), refused("above 64 bits")),
        ("a negative size", tensor(&six, b"K\0J\xff\xff\xff\xff\x85K\x01\x85"), refused("has the size -1")),
        ("a size that is a text", tensor(&six, b"K\0X\x01\0\0\0a\x85K\x01\x85"), refused("size that is no number")),
        ("too many", tensor(&six, b"K\0K\x07\x85K\x01\x85"), refused("has more elements than its storage's 6")),
        ("repeated", tensor(&six, b"K\0K\x07\x85K\0\x85"), refused("has more elements than its storage's 6")),
        ("behind the end", tensor(&six, b"K\x05K\x02\x85K\x01\x85"), refused("leaves its storage of 6 elements from 5")),
        ("wide steps", tensor(&six, b"K\0K\x02\x85K\x06\x85"), refused("leaves its storage")),
        ("one axis less", tensor(&six, b"K\0K\x02K\x03\x86K\x01\x85"), refused("do not belong together")),
        (
            "past all numbers",
            tensor(&six, b"K\0\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x86K\x01K\x01\x86"),
            refused("has more elements"),
        ),
        ("no storage", tensor(b"K\x01", b"K\0K\x02\x85K\x01\x85"), refused("a tensor without a storage")),
        ("a storage of a number", b"\x80\x02K\x01Q.".to_vec(), refused("what is no storage of torch")),
    ];
    for (name, pickle, want) in rows {
        check(name, &pickle, want);
    }
}

/// A list that holds the last one twice, again and again, takes no more memory than it has instructions.
#[test]
fn repeated_values_are_held_once() {
    let mut pickle = b"\x80\x02]q\0".to_vec();
    for _ in 0..10_000 {
        pickle.extend(b"h\0h\0\x86q\0");
    }
    pickle.push(b'.');
    check("doubled", &pickle, Err("holds no dictionary of tensors".into()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Any sequence of instructions, most of them known ones, ends in an answer.
    #[test]
    fn no_bytes_end_the_process(
        bytes in prop::collection::vec(
            prop_oneof![prop::sample::select(b"\x80\x02(.N\x88GKMJ\x8aX\x8c)]}\x85\x86\x87taesuqr\x94hjc\x93RQb0\n".to_vec()), 0u8..8, any::<u8>()],
            0..200,
        ),
    ) {
        let _ = tensors(&bytes);
    }

    /// Nor does a sound pickle with bytes changed.
    #[test]
    fn no_changed_byte_ends_the_process(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut pickle = tensor(&storage(6), b"K\0K\x02K\x03\x86K\x03K\x01\x86");
        for (at, byte) in changes {
            let at = at.index(pickle.len());
            pickle[at] = byte;
        }
        let _ = tensors(&pickle);
    }
}
