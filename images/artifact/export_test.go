package artifact

// RestoreLayer is restoreLayer for tests.
var RestoreLayer = restoreLayer
