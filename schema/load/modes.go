package load

import (
	"regexp"
	"strconv"

	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/token"
)

// likeOctal are the decimal numbers of which nobody can say whether an octal one was meant.
var likeOctal = regexp.MustCompile(`^[1-7][0-7]{2,3}$`)

// modes refuses file modes that were written in decimal where octal was meant. Their value does not tell: 755 is 0o1363,
// a mode like any other. So this looks at what the file says, and not at what CUE makes of it.
func (e *evaluation) modes(f *ast.File) {
	ast.Walk(f, func(n ast.Node) bool {
		field, ok := n.(*ast.Field)
		if !ok {
			return true
		}
		if name, _, err := ast.LabelName(field.Label); err == nil && name == "mode" {
			e.mode(field.Value)
		}
		return true
	}, nil)
}

// mode looks at a number, also as a default or as one of several.
func (e *evaluation) mode(x ast.Expr) {
	switch x := x.(type) {
	case *ast.ParenExpr:
		e.mode(x.X)
	case *ast.UnaryExpr:
		if x.Op == token.MUL {
			e.mode(x.X)
		}
	case *ast.BinaryExpr:
		if x.Op == token.OR || x.Op == token.AND {
			e.mode(x.X)
			e.mode(x.Y)
		}
	case *ast.BasicLit:
		if x.Kind != token.INT || !likeOctal.MatchString(x.Value) {
			return
		}
		n, err := strconv.Atoi(x.Value)
		if err != nil || n > 0o7777 {
			return // the schema refuses it
		}
		e.add(x.Pos(), "mode: %s is decimal; write 0o%s, or 0o%o if that is meant", x.Value, x.Value, n)
	}
}
