package iscsi

import (
	"fmt"
	"strings"
	"testing"
)

// A text negotiation that never comes to an end is given up, however little of it comes at a time.
func TestTextNegotiationsAreBounded(t *testing.T) {
	for name, value := range map[string]string{"rows": "", "bytes": strings.Repeat("v", maxValue)} {
		t.Run(name, func(t *testing.T) {
			text := textAfter(t, testDirectory{}, testInitiator, true)
			ttt, n := uint32(noTag), 0
			for ; ; n++ {
				pairs := make([]string, 4)
				for i := range pairs {
					pairs[i] = fmt.Sprintf("X-com.example.%d.%d=%s", n, i, value)
				}
				resp, rejected := text.step(textRequest(0, ttt, pairs...))
				if rejected {
					break
				}
				if n > maxTextRows {
					t.Fatalf("row %d is taken", n)
				}
				for _, kept := range text.keys.said {
					if kept != "" {
						t.Fatalf("%d bytes of a value are kept", len(kept))
					}
				}
				ttt = resp.ttt()
			}
			if value == "" && n != maxTextRows || value != "" && n != maxTextBytes/(4*maxValue) {
				t.Errorf("%d rows are taken", n)
			}
			if text.keys != nil || text.in != nil || text.size != 0 {
				t.Error("what was given up is kept")
			}
			if _, rejected := text.step(textRequest(flagFinal, noTag, "SendTargets=All")); rejected {
				t.Error("the next negotiation is rejected")
			}
		})
	}
}
