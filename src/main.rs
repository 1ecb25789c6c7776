//! The `inventoryd` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    inventoryd::cli::main()
}
