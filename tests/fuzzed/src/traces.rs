//! Traces: text or gzip.

use pcpu_cli::script::{Action, Script};

/// Reads the bytes as a trace, as the program does.
pub fn read_trace(data: &[u8]) {
    match Script::read_bytes("input", Vec::from(data)) {
        Ok(script) => {
            let mut areas = 0;
            for step in &script.steps {
                match step.action {
                    Action::Alloc { area, request } => {
                        assert_eq!(area, areas, "areas are counted up");
                        assert!(request.bytes() > 0 && request.align().is_power_of_two());
                        areas += 1;
                    }
                    Action::Free { area } => assert!(area < areas, "what is freed was allocated"),
                }
            }
            assert_eq!(areas, script.areas);
        }
        Err(error) => {
            let line = error.to_string();
            assert!(!line.contains('\n') && line.contains("input"), "{line}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
