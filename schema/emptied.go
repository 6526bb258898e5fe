package schema

import "fmt"

// Emptied is the error, a Problems, of a commit that takes the last host out of a fleet that had some and does not say
// "allowEmpty: true". A nil old fleet had no hosts.
func Emptied(old, new *Fleet) error {
	if old == nil || len(old.Hosts) == 0 || len(new.Hosts) > 0 || new.AllowEmpty {
		return nil
	}
	what := fmt.Sprintf("all %d hosts", len(old.Hosts))
	if len(old.Hosts) == 1 {
		what = "the only host"
	}
	return Problems{{Message: "hosts: this commit removes " + what + " at once; to mean it, add: allowEmpty: true"}}
}
