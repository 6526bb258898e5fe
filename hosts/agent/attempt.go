package agent

import (
	"errors"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// begin counts a boot into a, and keeps what it needs, before anything of a is touched: whatever becomes of the boot, the
// next one knows of it. A node whose disk takes no write runs what was good all the same; a boot of anything else that
// cannot be counted could be the first of many.
func (b *boot) begin(a agentapi.Assignment) error {
	err := errors.Join(b.cache.Remember(a), b.cache.Begin(deltaID(a)))
	if r, ok := b.cache.Record(deltaID(a)); err != nil && ok && r.IsGood() {
		b.log.Error("this boot cannot be counted", "error", err)
		return nil
	}
	return err
}
