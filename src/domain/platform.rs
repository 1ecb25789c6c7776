//! Platform of an object, derived from the name of its OData type.

/// Type name prefixes and their platforms. No prefix belongs to two platforms.
const PREFIXES: &[(&str, &str)] = &[
    ("win", "windows"),
    ("officesuite", "windows"),
    ("microsoftstore", "windows"),
    ("editionupgrade", "windows"),
    ("sharedpc", "windows"),
    ("ios", "iOS"),
    ("ipad", "iOS"),
    ("managedios", "iOS"),
    ("depios", "iOS"),
    ("macos", "macOS"),
    ("depmacos", "macOS"),
    ("deptvos", "tvOS"),
    ("depvisionos", "visionOS"),
    ("android", "android"),
    ("managedandroid", "android"),
    ("aosp", "aosp"),
    ("apple", "apple"),
    ("depenrollment", "apple"),
];

/// Platform of an `@odata.type`, if the name has a known prefix.
pub(super) fn of_type(odata_type: &str) -> Option<&'static str> {
    let name = odata_type.strip_prefix("#microsoft.graph.")?.to_ascii_lowercase();
    PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, platform)| *platform)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_follow_from_type_names() {
        for (name, platform) in [
            ("windows10GeneralConfiguration", Some("windows")),
            ("iosVppApp", Some("iOS")),
            ("managedAndroidStoreApp", Some("android")),
            ("macOSLobApp", Some("macOS")),
            ("webApp", None),
            ("aospDeviceOwnerCompliancePolicy", Some("aosp")),
            ("win32LobApp", Some("windows")),
        ] {
            assert_eq!(of_type(&format!("#microsoft.graph.{name}")), platform, "{name}");
        }
    }
}
