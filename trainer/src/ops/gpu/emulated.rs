//! In tests, the CPU in a GPU's place: the same kernels, compiled by the C++ compiler with `trainer/kernels/emulated`
//! for CUDA's headers, and a plain product for cuBLAS. Slow, and of races between threads it shows only those that
//! [`backwards`] gives another result; but what is launched, on what, and what comes out are those of a GPU.

use super::gemm::{Matrix, Product};
use super::staging::Slot;
use super::{Argument, Grid, Module, problem};
use crate::error::Result;
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use libloading::{Library, Symbol};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static BACKWARDS: Cell<bool> = const { Cell::new(false) };
    static READS: Cell<usize> = const { Cell::new(0) };
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static FAILS_AT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// How often this thread has asked for a GPU's memory, but for what candle asks for by itself.
pub(crate) fn allocations() -> usize {
    ALLOCATIONS.get()
}

/// Has the allocation of that number, counted as [`allocations`] counts, find the memory at its end; that one alone.
pub(crate) fn fail_at(number: usize) {
    FAILS_AT.set(Some(number));
}

/// Notes an allocation, or fails as it was told to.
pub(super) fn allocate() -> Result<()> {
    let number = ALLOCATIONS.replace(ALLOCATIONS.get() + 1);
    if FAILS_AT.get() == Some(number) {
        FAILS_AT.set(None);
        return Err(problem("out of memory, because a test wants it"));
    }
    Ok(())
}

/// How often this thread has waited for a GPU's numbers.
pub(crate) fn reads() -> usize {
    READS.get()
}

/// Notes that it does.
pub(super) fn note_read() {
    READS.set(READS.get() + 1);
}

/// Whether this thread's operations on the CPU are a GPU's.
pub(super) fn is_on() -> bool {
    ON.get()
}

/// Whether there is a compiler for it. Where there is none, a test says so and checks nothing.
pub(crate) fn is_possible() -> bool {
    let compiler = Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success());
    if !compiler {
        let why =
            "SKIPPED: the GPU's kernels on the CPU: there is no C++ compiler (Debian: apt-get install g++)";
        eprintln!("{why}");
        // What a test that passes says is not shown; `tests/run` shows what stands in this file.
        if let Some(path) = std::env::var_os("LORAFLEET_SKIPPED") {
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
            writeln!(file, "{why}").unwrap();
        }
    }
    compiler
}

/// Runs `f` with the CPU in a GPU's place.
pub(crate) fn emulated<T>(f: impl FnOnce() -> T) -> T {
    struct Off(bool);
    impl Drop for Off {
        fn drop(&mut self) {
            ON.set(self.0);
        }
    }
    let _off = Off(ON.replace(true));
    f()
}

/// Runs `f` with the threads and blocks of kernels in falling order. What a GPU promises does not depend on it.
pub(super) fn backwards<T>(f: impl FnOnce() -> T) -> T {
    struct Forwards;
    impl Drop for Forwards {
        fn drop(&mut self) {
            BACKWARDS.set(false);
        }
    }
    let _forwards = Forwards;
    BACKWARDS.set(true);
    f()
}

/// What a launch asks for that a GPU does not have.
fn limits(kernel: &str, grid: &Grid) -> Result<()> {
    let Grid { blocks, threads, shared } = *grid;
    // CUDA's programming guide, in all capabilities from 7.0 on; of shared memory, what those with tensor cores for bfloat16 have.
    let has = [
        (blocks.0, i32::MAX as u32, "blocks"),
        (blocks.1, u32::from(u16::MAX), "rows of blocks"),
        (threads, 1024, "threads"),
        (shared, 99 << 10, "bytes of shared memory"),
    ];
    match has.into_iter().find(|(asked, most, _)| asked > most) {
        Some((asked, most, what)) => Err(problem(format!("{kernel} asks for {asked} {what}, above {most}"))),
        None => Ok(()),
    }
}

/// Memory of which nobody has written anything: NaN, or the largest whole number.
pub(super) fn empty(shape: Shape, dtype: DType) -> Result<Tensor> {
    if shape.elem_count() == 0 {
        // Nobody says that a driver does.
        return Err(problem("a GPU gives no memory of no bytes"));
    }
    Ok(match dtype {
        DType::U8 => Tensor::full(u8::MAX, shape, &Device::Cpu)?,
        DType::F16 => Tensor::full(half::f16::NAN, shape, &Device::Cpu)?,
        DType::BF16 => Tensor::full(half::bf16::NAN, shape, &Device::Cpu)?,
        DType::F64 => Tensor::full(f64::NAN, shape, &Device::Cpu)?,
        _ => Tensor::full(f32::NAN, shape, &Device::Cpu)?.to_dtype(dtype)?,
    })
}

pub(super) fn pointer(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(problem("a tensor of another device")) };
    let start = match storage {
        CpuStorage::U8(x) => x.as_ptr() as u64,
        CpuStorage::U32(x) => x.as_ptr() as u64,
        CpuStorage::I64(x) => x.as_ptr() as u64,
        CpuStorage::F16(x) => x.as_ptr() as u64,
        CpuStorage::BF16(x) => x.as_ptr() as u64,
        CpuStorage::F32(x) => x.as_ptr() as u64,
        CpuStorage::F64(x) => x.as_ptr() as u64,
        _ => return Err(problem(format!("no GPU kernel takes {:?}", t.dtype()))),
    };
    Ok(start + (layout.start_offset() * t.dtype().size_in_bytes()) as u64)
}

/// Memory of the CPU's and, in a GPU's place, more of it. What a stream is given is done at once.
struct EmulatedSlot {
    here: Vec<u8>,
    there: Vec<u8>,
}

pub(super) fn slots(count: usize, bytes: usize) -> Vec<Box<dyn Slot>> {
    let slot = |_| -> Box<dyn Slot> {
        Box::new(EmulatedSlot { here: vec![u8::MAX; bytes], there: vec![u8::MAX; bytes] })
    };
    (0..count).map(slot).collect()
}

impl Slot for EmulatedSlot {
    fn bytes(&mut self) -> Result<&mut [u8]> {
        Ok(&mut self.here)
    }

    fn send(&mut self, count: usize) -> Result<u64> {
        self.there[..count].copy_from_slice(&self.here[..count]);
        Ok(self.there.as_ptr() as u64)
    }

    fn mark(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        // Whoever reads it later finds no number.
        self.there.fill(u8::MAX);
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Module {
    fn file(self) -> &'static str {
        match self {
            Self::Attention => "attention.cu",
            Self::Elementwise => "elementwise.cu",
            Self::Flash => "flash.cu",
            Self::Loss => "loss.cu",
            Self::Optimizer => "optimizer.cu",
            Self::Quant => "quant.cu",
        }
    }
}

/// A module's kernels, compiled for the CPU once in a process.
fn library(module: Module) -> &'static Library {
    static LIBRARIES: LazyLock<Mutex<HashMap<Module, &'static Library>>> = LazyLock::new(Default::default);
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    libraries.entry(module).or_insert_with(|| Box::leak(Box::new(compile(module))))
}

fn compile(module: Module) -> Library {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("kernels.cc"), dir.path().join("kernels.so"));
    let file = kernels.join(module.file());
    let include = format!("#include \"gemm.h\"\n#include \"{}\"\n", file.display());
    std::fs::write(&source, &include).unwrap();
    let compiler = |options: &[&str]| {
        let mut command = Command::new("c++");
        // No fused multiply-add where the source has none.
        command.args(["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-fPIC", "-I"]);
        command.arg(kernels.join("emulated")).args(options).arg(&source);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // The kernels' names are made by macros.
    let expanded = compiler(&["-E", "-P"]);
    let names = expanded.split("extern \"C\" void ").skip(1).filter_map(|rest| rest.split('(').next());
    let rows: String = names
        .map(str::trim)
        .filter(|name| *name != "gemm")
        .map(|name| format!("    {{\"{name}\", emulated::call<{name}>, emulated::kinds({name})}},\n"))
        .collect();
    let table = format!(
        "static const emulated::Kernel TABLE[] = {{\n{rows}}};\n\
         extern \"C\" int emulate_kernel(const char *name, const uint32_t *grid, void **arguments, const char *given) {{\n\
         \x20   return emulate(TABLE, sizeof TABLE / sizeof *TABLE, name, grid, arguments, given);\n}}\n"
    );
    std::fs::write(&source, include + &table).unwrap();
    compiler(&["-shared", "-o", program.to_str().unwrap()]);
    // SAFETY: the library was compiled just now from this repository; loading it runs constructors of globals alone.
    #[allow(unsafe_code, reason = "kernels are C++")]
    unsafe { Library::new(&program) }.unwrap()
}

pub(super) fn launch(module: Module, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
    type Launch =
        unsafe extern "C" fn(*const c_char, *const u32, *const *const c_void, *const c_char) -> c_int;
    // Each with its kind, as `emulator.h` names them.
    let (kinds, values): (Vec<u8>, Vec<u64>) = arguments
        .iter()
        .map(|argument| match argument {
            Argument::Pointer(value) => (b'p', *value),
            Argument::Count(value) => (b'c', *value),
            Argument::Width(value) => (b'w', u64::from(*value)),
            Argument::Number(value) => (b'n', u64::from(value.to_bits())),
            Argument::Double(value) => (b'd', value.to_bits()),
        })
        .unzip();
    let places: Vec<*const c_void> = values.iter().map(|value| std::ptr::from_ref(value).cast()).collect();
    limits(kernel, &grid)?;
    let name = CString::new(kernel).unwrap();
    let numbers = [grid.blocks.0, grid.blocks.1, grid.threads, grid.shared, u32::from(BACKWARDS.get())];
    let given = CString::new(kinds).unwrap();
    // SAFETY: the function is declared so in `compile`; a kernel gets the arguments that it takes, or is not called;
    // `super::launch` says what its callers have made sure of. A little-endian word begins with the number that it
    // holds. Tensors that a kernel writes are on the heap, and no reference to their elements is alive here.
    #[allow(unsafe_code, reason = "kernels are C++")]
    let result = unsafe {
        let launch: Symbol<Launch> = library(module).get(b"emulate_kernel").unwrap();
        launch(name.as_ptr(), numbers.as_ptr(), places.as_ptr(), given.as_ptr())
    };
    match result {
        0 => Ok(()),
        1 => Err(problem(format!("{module:?} has no kernel {kernel}"))),
        _ => Err(problem(format!("{kernel} does not take {arguments:?}"))),
    }
}

pub(super) fn gemm(product: &Product) {
    /// As `gemm.h` has it.
    #[repr(C)]
    struct Given {
        start: u64,
        stride: u64,
        step: u64,
        dtype: u32,
        transposed: u32,
    }
    type Gemm = unsafe extern "C" fn(*const u64, *const Given, *const Given, *const Given, f32, f32);
    let given = |matrix: &Matrix| Given {
        start: matrix.start,
        stride: matrix.stride as u64,
        step: matrix.step as u64,
        dtype: [DType::F32, DType::F16, DType::BF16].iter().position(|d| *d == matrix.dtype).unwrap() as u32,
        transposed: matrix.transposed.into(),
    };
    let [m, n, k] = product.size;
    let size = [m, n, k, product.batches].map(|x| x as u64);
    let (a, b, c) = (given(&product.a), given(&product.b), given(&product.c));
    // SAFETY: the function is declared so in `gemm.h`; `super::gemm::gemm` says what its callers have made sure of.
    #[allow(unsafe_code, reason = "kernels are C++")]
    unsafe {
        let gemm: Symbol<Gemm> = library(Module::Loss).get(b"gemm").unwrap();
        gemm(size.as_ptr(), &a, &b, &c, product.alpha, product.beta);
    }
}
